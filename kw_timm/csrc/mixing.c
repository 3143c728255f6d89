/*
 * Kernels from warehouse cells on the CPU, at the speed at which cells can be read.
 *
 * A matrix product of few rows by a wide matrix is what general libraries do at a fraction of a machine's read
 * bandwidth. Here every cell is read once for all rows, and the result is written where the convolution wants it:
 *
 *     out[g, r](o, i) = sum over j of coefficients[g, r, j] * cells[g, j, o, i]
 *
 * is stored at out + offsets[g, r] + o * out_stride + i * in_stride (in elements), times the factor of the output
 * channel if there are factors. Source of the method: arXiv 2406.07879, section 3.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

#if !defined(__GNUC__)
#error "The vector types are those of GCC and Clang. Without this module torch's operations are used."
#endif

#define COLUMN_BYTES 2048 /* of a cell at a time, with few rows: four cells' share and their sums fit the first cache */
#define DOT_BYTES (COLUMN_BYTES + 64) /* from one copied row to the next */
#define PANEL_BYTES 960   /* of a cell at a time, with many rows: a multiple of every set's panels */
#define DEPTH 256         /* cells copied side by side at a time: their share fits the second cache */
#define MOST_ROWS 288     /* of which sums are kept in the second cache */
#define MANY_ROWS 8       /* whose coefficients lie side by side */
#define MOST_SPARE (32 << 20) /* bytes */
#define MANY_FROM 28      /* from so many rows on, copying the cells pays */

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__linux__)
#define SETS_OF_X86 1
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
#endif
#define ALWAYS_INLINE inline __attribute__((always_inline))
#define PREFETCH(address) __builtin_prefetch(address, 0, 2)
#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

#define EACH_LANE(of, d)                                                                                               \
    {of(d, 0), of(d, 1), of(d, 2),  of(d, 3),  of(d, 4),  of(d, 5),  of(d, 6),  of(d, 7),                              \
     of(d, 8), of(d, 9), of(d, 10), of(d, 11), of(d, 12), of(d, 13), of(d, 14), of(d, 15)}

static ALWAYS_INLINE float widen_bfloat16(uint16_t value)
{
    const uint32_t bits = (uint32_t)value << 16;
    float result;
    memcpy(&result, &bits, sizeof result);
    return result;
}

typedef struct {
    void (*mix_few)(void *, const void *, const void *, ptrdiff_t, ptrdiff_t, ptrdiff_t, ptrdiff_t, ptrdiff_t);
    void (*mix_many)(void *, const void *, const void *, ptrdiff_t, ptrdiff_t, ptrdiff_t,
                     ptrdiff_t, ptrdiff_t, void *);
    void (*add_dots)(void *, const void *, ptrdiff_t, ptrdiff_t, const void *, ptrdiff_t, ptrdiff_t, ptrdiff_t, void *);
} Products;

#define SET(name) name##_any
#define VECTOR_BYTES 16
#define PANEL_VECTORS 3
#define TILE_ROWS 4
#define FEW_ROWS 6
#define DOT_ROWS 4
#include "instruction_set.h"

#if defined(SETS_OF_X86)
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
#define SET(name) name##_v3
#define VECTOR_BYTES 32
#define PANEL_VECTORS 3
#define TILE_ROWS 4
#define FEW_ROWS 6
#define DOT_ROWS 2
#include "instruction_set.h"
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4")
#define SET(name) name##_v4
#define VECTOR_BYTES 64
#define PANEL_VECTORS 3
#define TILE_ROWS 8
#define FEW_ROWS 12
#define DOT_ROWS 4
#include "instruction_set.h"
#pragma GCC pop_options
#endif

/* By the codes of the types: float32, float64, bfloat16, int8. */
static const Products *products = products_any;

#include "attention.h"

typedef struct {
    char *out;
    const char *coefficients, *cells, *factors; /* factors: per output channel, or NULL */
    const int64_t *offsets;
    Py_ssize_t groups, rows, num_cells, length, width; /* a cell has `length` elements, in lines of `width` */
    Py_ssize_t coefficient_group, coefficient_row, coefficient_cell, cell_group, cell_stride;
    Py_ssize_t out_stride, in_stride, channels;
    int code, add;
    /* What follows is worked out from the above. */
    Py_ssize_t real_size, cell_size, columns, row_step, work_bytes;
    char *packed;
} Task;

/* Store some rows of sums, whose elements alternate in the result, the columns [start, start + width) line by line. */
#define STORE(NAME, REAL)                                                                                              \
    CLONES static void NAME(const Task *task, REAL *restrict sums, Py_ssize_t rows, int64_t offset, Py_ssize_t start,  \
                            Py_ssize_t width)                                                                          \
    {                                                                                                                  \
        const Py_ssize_t columns = task->columns;                                                                      \
        const REAL *factors = (const REAL *)task->factors;                                                             \
        for (Py_ssize_t c = 0, length; c < width; c += length) {                                                       \
            const Py_ssize_t line = (start + c) / task->width, i = (start + c) % task->width;                          \
            REAL *restrict to = (REAL *)task->out + offset + line * task->out_stride + i * task->in_stride;            \
            length = task->width - i < width - c ? task->width - i : width - c;                                        \
            if (factors) {                                                                                             \
                const REAL factor = factors[offset / task->out_stride % task->channels + line];                        \
                for (Py_ssize_t row = 0; row < rows; row++)                                                            \
                    for (Py_ssize_t k = 0; k < length; k++)                                                            \
                        sums[row * columns + c + k] *= factor;                                                         \
            }                                                                                                          \
            if (task->in_stride == 1 && !task->add)                                                                    \
                memcpy(to, sums + c, length * sizeof(REAL));                                                           \
            else if (task->in_stride == 1)                                                                             \
                for (Py_ssize_t k = 0; k < length; k++)                                                                \
                    to[k] += sums[c + k];                                                                              \
            else if (!task->add)                                                                                       \
                for (Py_ssize_t k = 0; k < length; k++)                                                                \
                    for (Py_ssize_t row = 0; row < rows; row++)                                                        \
                        to[k * task->in_stride + row] = sums[row * columns + c + k];                                   \
            else                                                                                                       \
                for (Py_ssize_t row = 0; row < rows; row++)                                                            \
                    for (Py_ssize_t k = 0; k < length; k++)                                                            \
                        to[k * task->in_stride + row] += sums[row * columns + c + k];                                  \
        }                                                                                                              \
    }
STORE(store_float32, float)
STORE(store_float64, double)

static int has_many_rows(const Task *task) { return task->rows >= MANY_FROM; }

/* How many rows' coefficients lie side by side when they are packed. */
static Py_ssize_t side_by_side(const Task *task) { return has_many_rows(task) ? MANY_ROWS : task->rows; }

static Py_ssize_t padded(Py_ssize_t rows, Py_ssize_t multiple) { return (rows + multiple - 1) / multiple * multiple; }

/* A group's coefficients in the order in which the tiles take them: cell by cell, some rows side by side. */
#define PACK(NAME, REAL)                                                                                               \
    static void NAME(const Task *task, Py_ssize_t group)                                                               \
    {                                                                                                                  \
        const Py_ssize_t side = side_by_side(task), rows = padded(task->rows, side);                                   \
        const REAL *from = (const REAL *)task->coefficients + group * task->coefficient_group;                         \
        REAL *to = (REAL *)task->packed + group * rows * task->num_cells;                                              \
        for (Py_ssize_t r = 0; r < rows; r++, from += task->coefficient_row)                                           \
            for (Py_ssize_t j = 0; j < task->num_cells; j++)                                                           \
                to[(r / side * task->num_cells + j) * side + r % side] =                                               \
                    r < task->rows ? from[j * task->coefficient_cell] : 0;                                             \
    }
PACK(pack_float32, float)
PACK(pack_float64, double)

/* A block of columns of one group's cells, for all rows. */
static void mix_columns(const Task *task, Py_ssize_t group, Py_ssize_t start, char *work)
{
    const Py_ssize_t left = task->length - start, width = left < task->columns ? left : task->columns;
    const char *cells = task->cells + (group * task->cell_group + start) * task->cell_size;
    const Products *of = products + task->code;
    const Py_ssize_t ahead = left > width ? width : 0;
    if (!task->num_cells)
        memset(work, 0, task->work_bytes);
    for (Py_ssize_t r = 0; r < task->rows; r += task->row_step) {
        const Py_ssize_t rows = task->rows - r < task->row_step ? task->rows - r : task->row_step;
        const int64_t *offsets = task->offsets + group * task->rows + r;
        const char *coefficients =
            task->packed + (group * padded(task->rows, side_by_side(task)) + r) * task->num_cells * task->real_size;
        if (has_many_rows(task))
            of->mix_many(work, coefficients, cells, task->cell_stride, padded(rows, MANY_ROWS), task->num_cells, width,
                         ahead, work + MOST_ROWS * PANEL_BYTES);
        else
            of->mix_few(work, coefficients, cells, task->cell_stride, rows, task->num_cells, width, ahead);
        for (Py_ssize_t row = 0, count; row < rows; row += count) {
            char *sums = work + row * task->columns * task->real_size;
            for (count = 1; count < task->in_stride && row + count < rows; count++)
                if (offsets[row + count] != offsets[row] + count)
                    break;
            if (task->add && row + 4 < rows) /* Rows lie far apart: the processor does not foresee the next ones. */
                for (Py_ssize_t c = 0; c < width * task->real_size; c += 64)
                    __builtin_prefetch(task->out + (offsets[row + 4] + start) * task->real_size + c, 1, 2);
            if (task->code == 1)
                store_float64(task, (double *)sums, count, offsets[row], start, width);
            else
                store_float32(task, (float *)sums, count, offsets[row], start, width);
        }
    }
}

/* Waking threads costs as much as some 100,000 multiply-adds. */
static Py_ssize_t threads_for(double multiply_adds, Py_ssize_t blocks)
{
#if defined(_OPENMP)
    const Py_ssize_t most = multiply_adds > 1e5 ? omp_get_max_threads() : 1;
    return most < blocks ? most : blocks > 1 ? blocks : 1;
#else
    (void)multiply_adds;
    (void)blocks;
    return 1;
#endif
}

static Py_ssize_t this_thread(void)
{
#if defined(_OPENMP)
    return omp_get_thread_num();
#else
    return 0;
#endif
}

/* The last call's memory serves the next: asked for anew, the system would back it page by page. */
typedef struct {
    char *memory; /* NULL if there was none to have */
    Py_ssize_t size;
} Block;
static Block spare;

/* Called with the interpreter's lock held, as is give_back. */
static Block borrow(Py_ssize_t size)
{
    Block block = spare;
    spare = (Block){NULL, 0};
    if (block.size < size) {
        free(block.memory);
        block.memory = malloc(size);
        block.size = block.memory ? size : 0;
    }
    return block;
}

static void give_back(Block block)
{
    if (spare.memory || block.size > MOST_SPARE)
        free(block.memory);
    else
        spare = block;
}

static char *aligned(char *memory) { return memory + (64 - (uintptr_t)memory % 64); }

static PyObject *mix(PyObject *module, PyObject *args)
{
    static const Py_ssize_t cell_sizes[] = {4, 8, 2, 1};
    Task task;
    Py_ssize_t out, coefficients, cells, factors, offsets;
    (void)module;
    if (!PyArg_ParseTuple(args, "nnnnniinnnnnnnnnnnnn", &out, &coefficients, &cells, &factors, &offsets, &task.code,
                          &task.add, &task.groups, &task.rows, &task.num_cells, &task.length, &task.width,
                          &task.coefficient_group, &task.coefficient_row, &task.coefficient_cell, &task.cell_group,
                          &task.cell_stride, &task.out_stride, &task.in_stride, &task.channels))
        return NULL;
    if (!task.groups || !task.rows || !task.length)
        Py_RETURN_NONE;
    task.out = (char *)out;
    task.coefficients = (const char *)coefficients;
    task.cells = (const char *)cells;
    task.factors = (const char *)factors;
    task.offsets = (const int64_t *)offsets;
    task.real_size = task.code == 1 ? 8 : 4;
    task.cell_size = cell_sizes[task.code];
    const int many = has_many_rows(&task);
    task.columns = (many ? PANEL_BYTES : COLUMN_BYTES) / task.real_size;
    task.row_step = many ? MOST_ROWS : MANY_FROM;
    task.work_bytes = many ? (MOST_ROWS + DEPTH) * PANEL_BYTES : MANY_FROM * COLUMN_BYTES;
    const Py_ssize_t blocks = (task.length + task.columns - 1) / task.columns, work = task.groups * blocks;
    const Py_ssize_t threads = threads_for((double)task.groups * task.rows * task.num_cells * task.length, work);
    const Py_ssize_t packed =
        task.groups * padded(task.rows, side_by_side(&task)) * task.num_cells * task.real_size;
    const Block block = borrow(threads * task.work_bytes + packed + 64);
    if (!block.memory)
        return PyErr_NoMemory();
    Py_BEGIN_ALLOW_THREADS
    char *buffers = aligned(block.memory);
    task.packed = buffers + threads * task.work_bytes;
    for (Py_ssize_t group = 0; group < task.groups; group++)
        (task.code == 1 ? pack_float64 : pack_float32)(&task, group);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (Py_ssize_t w = 0; w < work; w++) /* Groups change fastest: their results may lie between one another's. */
        mix_columns(&task, w % task.groups, w / task.groups * task.columns, buffers + this_thread() * task.work_bytes);
    Py_END_ALLOW_THREADS
    give_back(block);
    Py_RETURN_NONE;
}

/* dots[row][cell] += sum over columns of left[row][column] * right[cell][column], in blocks of columns. */
static PyObject *add_dots(PyObject *module, PyObject *args)
{
    Py_ssize_t out, left, right, rows, num_cells, length, left_stride, right_stride;
    int code;
    (void)module;
    if (!PyArg_ParseTuple(args, "nnninnnnn", &out, &left, &right, &code, &rows, &num_cells, &length, &left_stride,
                          &right_stride))
        return NULL;
    const Py_ssize_t size = code == 1 ? 8 : 4, columns = COLUMN_BYTES / size, count = rows * num_cells;
    const Py_ssize_t blocks = (length + columns - 1) / columns, step = rows < MOST_ROWS ? rows : MOST_ROWS;
    const Py_ssize_t threads = threads_for((double)count * length, blocks);
    const Py_ssize_t work_bytes = (step + 4) * DOT_BYTES, partial_bytes = threads * count * size;
    const Block block = borrow(threads * work_bytes + partial_bytes + 64);
    if (!block.memory)
        return PyErr_NoMemory();
    Py_BEGIN_ALLOW_THREADS
    char *work = aligned(block.memory), *partial = work + threads * work_bytes;
    memset(partial, 0, partial_bytes);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (Py_ssize_t b = 0; b < blocks; b++) {
        const Py_ssize_t c = b * columns, width = length - c < columns ? length - c : columns;
        for (Py_ssize_t r = 0; r < rows; r += step)
            products[code].add_dots(partial + (this_thread() * count + r * num_cells) * size,
                                    (const char *)left + (r * left_stride + c) * size, left_stride,
                                    rows - r < step ? rows - r : step, (const char *)right + c * size, right_stride,
                                    num_cells, width, work + this_thread() * work_bytes);
    }
    for (Py_ssize_t t = 0; t < threads; t++)
        for (Py_ssize_t i = 0; i < count; i++)
            if (code == 1)
                ((double *)out)[i] += ((double *)partial)[t * count + i];
            else
                ((float *)out)[i] += ((float *)partial)[t * count + i];
    Py_END_ALLOW_THREADS
    give_back(block);
    Py_RETURN_NONE;
}

static PyObject *use_huge_pages(PyObject *module, PyObject *args)
{
    Py_ssize_t address, size;
    (void)module;
    if (!PyArg_ParseTuple(args, "nn", &address, &size))
        return NULL;
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    const Py_ssize_t page = 1 << 21, start = (address + page - 1) / page * page, stop = (address + size) / page * page;
    if (stop > start)
        madvise((void *)start, stop - start, MADV_HUGEPAGE); /* Advice: nothing is lost if it is not taken. */
#endif
    Py_RETURN_NONE;
}

static int select_products(int bytes)
{
    products = products_any;
#if defined(SETS_OF_X86)
    if (bytes >= 64 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512cd")) {
        products = products_v4;
        return 64;
    }
    if (bytes >= 32 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
        __builtin_cpu_supports("bmi2")) {
        products = products_v3;
        return 32;
    }
#endif
    (void)bytes;
    return 16;
}

static PyObject *use_vectors(PyObject *module, PyObject *args)
{
    int bytes;
    (void)module;
    if (!PyArg_ParseTuple(args, "i", &bytes))
        return NULL;
    return PyLong_FromLong(select_products(bytes));
}

static PyMethodDef methods[] = {
    {"mix", mix, METH_VARARGS,
     "mix(out, coefficients, cells, factors, offsets, code, add, groups, rows, num_cells, length, width, "
     "coefficient_group, coefficient_row, coefficient_cell, cell_group, cell_stride, out_stride, in_stride, channels): "
     "addresses, the types, whether to add to what is there, then sizes and strides in elements. Called by "
     "kw_timm.layers.mixing alone, which checks them."},
    {"add_dots", add_dots, METH_VARARGS,
     "add_dots(out, left, right, code, rows, num_cells, length, left_stride, right_stride): add left @ right.T to out. "
     "Addresses, the type, then sizes and strides in elements. Called by kw_timm.layers.mixing alone."},
    {"attend", attend, METH_VARARGS,
     "attend(x, first, first_bias, norm_weight, norm_bias, second, second_bias, work, out, batch, channels, pixels, "
     "width, mixtures, logits, epsilon, bases): addresses (work: batch * (channels + width) elements), then sizes. "
     "Called by kw_timm.layers.folded_attention alone, which checks them."},
    {"use_vectors", use_vectors, METH_VARARGS,
     "use_vectors(bytes): use the widest vectors that the processor has and that have at most so many bytes; return "
     "their bytes. For tests."},
    {"use_huge_pages", use_huge_pages, METH_VARARGS,
     "use_huge_pages(address, size): have the system back memory that was not yet written by large pages."},
    {NULL, NULL, 0, NULL}};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_mixing", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__mixing(void)
{
    select_products(64);
    return PyModule_Create(&definition);
}
