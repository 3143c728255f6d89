/*
 * The compiled module: kernels from warehouse cells on the CPU, at the speed at which cells can be read.
 *
 * A matrix product of few rows by a wide matrix is what general libraries do at a fraction of a machine's read
 * bandwidth. Here are arguments, threads and memory; what is computed is in mix.h, dots.h and attention.h.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdlib.h>
#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "tasks.h"

namespace {

using namespace kw_timm;

const InstructionSet *instructions = &any_set;

/* Arguments are addresses, sizes and one float. */
template <typename Type> void read(PyObject *from, Type *&to) { to = (Type *)PyLong_AsVoidPtr(from); }
void read(PyObject *from, ptrdiff_t &to) { to = PyNumber_AsSsize_t(from, PyExc_OverflowError); }
void read(PyObject *from, float &to) { to = (float)PyFloat_AsDouble(from); }

template <typename... Types> bool read_all(PyObject *const *args, Py_ssize_t count, Types &...to)
{
    if (count == sizeof...(to))
        return ((read(*args++, to), !PyErr_Occurred()) && ...);
    PyErr_Format(PyExc_TypeError, "Expected %d arguments, got %zd.", (int)sizeof...(to), count);
    return false;
}

/* Waking threads costs as much as some 100,000 multiply-adds. */
ptrdiff_t threads_for(double multiply_adds, ptrdiff_t blocks)
{
#if defined(_OPENMP)
    const ptrdiff_t most = multiply_adds > 1e5 ? omp_get_max_threads() : 1;
    return most < blocks ? most : blocks > 1 ? blocks : 1;
#else
    (void)multiply_adds, (void)blocks;
    return 1;
#endif
}

ptrdiff_t this_thread()
{
#if defined(_OPENMP)
    return omp_get_thread_num();
#else
    return 0;
#endif
}

/* Memory for one call. The last call's serves the next: asked for anew, the system would back it page by page. */
class Memory {
  public:
    /* Like the end of its life, with the interpreter's lock held. */
    explicit Memory(ptrdiff_t bytes) : start(spare), size(spare_size)
    {
        spare = NULL;
        spare_size = 0;
        if (size < bytes + ALIGNMENT) {
            free(start);
            size = bytes + ALIGNMENT;
            start = malloc(size);
        }
    }
    ~Memory()
    {
        if (start && !spare && size <= MOST_SPARE) {
            spare = start;
            spare_size = size;
        } else
            free(start);
    }
    Memory(const Memory &) = delete;

    /* NULL if there was none to have. */
    char *aligned() const { return start ? (char *)start + (ALIGNMENT - (uintptr_t)start % ALIGNMENT) : NULL; }

  private:
    static constexpr ptrdiff_t ALIGNMENT = 64, MOST_SPARE = 32 << 20;
    static inline void *spare;
    static inline ptrdiff_t spare_size;
    void *start;
    ptrdiff_t size;
};

PyObject *mix(PyObject *, PyObject *const *args, Py_ssize_t count)
{
    Mixing m;
    if (!read_all(args, count, m.out, m.coefficients, m.cells, m.factors, m.offsets, m.code, m.add, m.groups, m.rows,
                  m.num_cells, m.length, m.width, m.coefficient_group, m.coefficient_row, m.coefficient_cell,
                  m.cell_group, m.cell_stride, m.out_stride, m.in_stride, m.channels))
        return NULL;
    if (!m.groups || !m.rows || !m.length)
        Py_RETURN_NONE;
    const Products &products = instructions->products[m.code];
    const ptrdiff_t columns = m.column_bytes() / products.real_size;
    const ptrdiff_t blocks = (m.length + columns - 1) / columns * m.groups;
    const ptrdiff_t threads = threads_for((double)m.groups * m.rows * m.num_cells * m.length, blocks);
    const ptrdiff_t work_bytes = m.work_bytes();
    const Memory memory(threads * work_bytes + m.groups * m.packed_rows() * m.num_cells * products.real_size);
    char *const work = memory.aligned();
    if (!work)
        return PyErr_NoMemory();
    m.packed = work + threads * work_bytes;
    Py_BEGIN_ALLOW_THREADS
    for (ptrdiff_t group = 0; group < m.groups; group++)
        products.pack(m, group);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (ptrdiff_t b = 0; b < blocks; b++) /* Groups change fastest: their results may lie between one another's. */
        products.mix(m, b % m.groups, b / m.groups, work + this_thread() * work_bytes);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

PyObject *add_dots(PyObject *, PyObject *const *args, Py_ssize_t count)
{
    Dots d;
    if (!read_all(args, count, d.dots, d.left, d.right, d.code, d.rows, d.num_cells, d.length, d.left_stride,
                  d.right_stride))
        return NULL;
    const Products &products = instructions->products[d.code];
    const ptrdiff_t columns = COLUMN_BYTES / products.real_size, blocks = (d.length + columns - 1) / columns;
    const ptrdiff_t threads = threads_for((double)d.rows * d.num_cells * d.length, blocks);
    const ptrdiff_t work_bytes = d.work_bytes(), partial_bytes = d.rows * d.num_cells * products.real_size;
    const Memory memory(threads * (work_bytes + partial_bytes));
    char *const work = memory.aligned(), *const partial = work + threads * work_bytes;
    if (!work)
        return PyErr_NoMemory();
    Py_BEGIN_ALLOW_THREADS
    memset(partial, 0, threads * partial_bytes);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (ptrdiff_t b = 0; b < blocks; b++)
        products.add_dots(d, b, partial + this_thread() * partial_bytes, work + this_thread() * work_bytes);
    for (ptrdiff_t t = 0; t < threads; t++)
        products.add_up(d.dots, partial + t * partial_bytes, d.rows * d.num_cells);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

PyObject *attend(PyObject *, PyObject *const *args, Py_ssize_t count)
{
    Attention a;
    if (!read_all(args, count, a.x, a.first, a.first_bias, a.norm_weight, a.norm_bias, a.second, a.second_bias,
                  a.pooled, a.out, a.batch, a.channels, a.pixels, a.width, a.mixtures, a.logits, a.epsilon, a.bases))
        return NULL;
    a.hidden = a.pooled + a.batch * a.channels;
    const InstructionSet &set = *instructions;
    const ptrdiff_t rows = a.batch * a.channels, tasks = a.batch * a.mixtures;
    bool failed = false;
    Py_BEGIN_ALLOW_THREADS
#pragma omp parallel for schedule(static) if (rows * a.pixels > 50000)
    for (ptrdiff_t row = 0; row < rows; row++)
        a.pooled[row] = set.mean(a.x + row * a.pixels, a.pixels);
#pragma omp parallel for schedule(static) if (rows * a.width > 200000)
    for (ptrdiff_t sample = 0; sample < a.batch; sample++)
        set.hide(a, sample);
#pragma omp parallel if (tasks * a.width * a.logits > 100000)
    {
        float *logits = (float *)malloc(a.logits * sizeof(float));
#pragma omp for schedule(static)
        for (ptrdiff_t task = 0; task < tasks; task++)
            if (logits)
                set.attend(a, task % a.batch, task / a.batch, logits);
            else
                failed = true;
        free(logits);
    }
    Py_END_ALLOW_THREADS
    if (failed)
        return PyErr_NoMemory();
    Py_RETURN_NONE;
}

PyObject *use_huge_pages(PyObject *, PyObject *const *args, Py_ssize_t count)
{
    ptrdiff_t address, size;
    if (!read_all(args, count, address, size))
        return NULL;
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    const ptrdiff_t page = 1 << 21, start = (address + page - 1) / page * page, stop = (address + size) / page * page;
    if (stop > start)
        madvise((void *)start, stop - start, MADV_HUGEPAGE); /* Advice: nothing is lost if it is not taken. */
#endif
    Py_RETURN_NONE;
}

const InstructionSet *widest_set(ptrdiff_t bytes)
{
#if defined(__x86_64__)
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                        __builtin_cpu_supports("avx512cd");
    if (bytes >= 64 && avx512)
        return &avx512_set;
    if (bytes >= 32 && avx2)
        return &avx2_set;
#endif
    (void)bytes;
    return &any_set;
}

PyObject *use_vectors(PyObject *, PyObject *const *args, Py_ssize_t count)
{
    ptrdiff_t bytes;
    if (!read_all(args, count, bytes))
        return NULL;
    instructions = widest_set(bytes);
    return PyLong_FromSsize_t(instructions->vector_bytes);
}

PyMethodDef methods[] = {
    {"mix", (PyCFunction)(void (*)())mix, METH_FASTCALL,
     "mix(out, coefficients, cells, factors, offsets, code, add, groups, rows, num_cells, length, width, "
     "coefficient_group, coefficient_row, coefficient_cell, cell_group, cell_stride, out_stride, in_stride, channels): "
     "addresses, the types, whether to add to what is there, then sizes and strides in elements. Called by "
     "kw_timm.ops.native alone, which checks them."},
    {"add_dots", (PyCFunction)(void (*)())add_dots, METH_FASTCALL,
     "add_dots(out, left, right, code, rows, num_cells, length, left_stride, right_stride): add left @ right.T to out. "
     "Addresses, the type, then sizes and strides in elements. Called by kw_timm.ops.native alone."},
    {"attend", (PyCFunction)(void (*)())attend, METH_FASTCALL,
     "attend(x, first, first_bias, norm_weight, norm_bias, second, second_bias, work, out, batch, channels, pixels, "
     "width, mixtures, logits, epsilon, bases): addresses (work: batch * (channels + width) elements), then sizes. "
     "Called by kw_timm.ops.native alone, which checks them."},
    {"use_vectors", (PyCFunction)(void (*)())use_vectors, METH_FASTCALL,
     "use_vectors(bytes): use the widest vectors that the processor has and that have at most so many bytes; return "
     "their bytes. For tests."},
    {"use_huge_pages", (PyCFunction)(void (*)())use_huge_pages, METH_FASTCALL,
     "use_huge_pages(address, size): have the system back memory that was not yet written by large pages."},
    {NULL, NULL, 0, NULL}};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_mixing", NULL, -1, methods, NULL, NULL, NULL, NULL};

}

PyMODINIT_FUNC PyInit__mixing()
{
    instructions = widest_set(64);
    return PyModule_Create(&definition);
}
