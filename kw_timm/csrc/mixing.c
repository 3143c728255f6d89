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
#if defined(__linux__)
#include <sys/mman.h>
#endif

#define CHUNK 512 /* columns: eight cells' share, and the sums of a few rows, fit the first cache */
#define STEP 8    /* cells at a time */
#define ROWS 32   /* rows at a time */

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__linux__)
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
#endif
#if defined(__GNUC__)
#define PREFETCH(address) __builtin_prefetch(address, 0, 2)
#else
#define PREFETCH(address) (void)0
#define restrict __restrict
#endif

static inline float widen_bfloat16(uint16_t value)
{
    const uint32_t bits = (uint32_t)value << 16;
    float result;
    memcpy(&result, &bits, sizeof result);
    return result;
}

#define REAL float
#define CELL float
#define LOAD(x) (x)
#define MIX_CHUNK mix_chunk_float32
#include "mix_chunk.h"

#define REAL double
#define CELL double
#define LOAD(x) (x)
#define MIX_CHUNK mix_chunk_float64
#include "mix_chunk.h"

#define REAL float
#define CELL uint16_t
#define LOAD(x) widen_bfloat16(x)
#define MIX_CHUNK mix_chunk_bfloat16
#include "mix_chunk.h"

#define REAL float
#define CELL int8_t
#define LOAD(x) ((float)(x))
#define MIX_CHUNK mix_chunk_int8
#include "mix_chunk.h"

#include "attention.h"

typedef struct {
    char *out;
    const char *coefficients, *cells, *factors; /* factors: per output channel, or NULL */
    const int64_t *offsets;
    Py_ssize_t groups, rows, num_cells, length, width; /* a cell has `length` elements, in lines of `width` */
    Py_ssize_t coefficient_group, coefficient_row, cell_group, cell_stride, out_stride, in_stride, channels;
    int code;
} Task;

/* Store some rows of sums, whose elements alternate in the result, the columns [start, start + width) line by line. */
#define STORE(NAME, REAL)                                                                                            \
    static void NAME(const Task *task, REAL *sums, Py_ssize_t rows, int64_t offset, Py_ssize_t start,          \
                     Py_ssize_t width)                                                                               \
    {                                                                                                                \
        for (Py_ssize_t c = 0, length; c < width; c += length) {                                                     \
            const Py_ssize_t line = (start + c) / task->width, i = (start + c) % task->width;                        \
            REAL *to = (REAL *)task->out + offset + line * task->out_stride + i * task->in_stride;                   \
            length = task->width - i < width - c ? task->width - i : width - c;                                      \
            const REAL *factors = (const REAL *)task->factors;                                                       \
            if (factors) {                                                                                           \
                const REAL factor = factors[offset / task->out_stride % task->channels + line];                      \
                for (Py_ssize_t row = 0; row < rows; row++)                                                          \
                    for (Py_ssize_t k = 0; k < length; k++)                                                          \
                        sums[row * CHUNK + c + k] *= factor;                                                         \
            }                                                                                                        \
            if (task->in_stride == 1)                                                                                \
                memcpy(to, sums + c, length * sizeof(REAL));                                                         \
            else                                                                                                     \
                for (Py_ssize_t k = 0; k < length; k++)                                                              \
                    for (Py_ssize_t row = 0; row < rows; row++)                                                      \
                        to[k * task->in_stride + row] = sums[row * CHUNK + c + k];                                   \
        }                                                                                                            \
    }
STORE(store_float32, float)
STORE(store_float64, double)

#define MIX(CHUNK_OF, STORE_OF, REAL, CELL)                                                                          \
    CHUNK_OF((REAL *)sums, (const REAL *)task->coefficients + a, task->coefficient_row,                              \
             (const CELL *)task->cells + e, task->cell_stride, rows, task->num_cells, width);                        \
    for (Py_ssize_t row = 0, count; row < rows; row += count) {                                                      \
        for (count = 1; count < task->in_stride && row + count < rows; count++)                                      \
            if (offsets[row + count] != offsets[row] + count)                                                        \
                break;                                                                                               \
        STORE_OF(task, (REAL *)sums + row * CHUNK, count, offsets[row], start, width);                               \
    }

/* The columns [start, start + CHUNK) of one group's cells, for all rows. */
static void mix_columns(const Task *task, Py_ssize_t group, Py_ssize_t start)
{
    double sums[ROWS * CHUNK];
    const Py_ssize_t width = task->length - start < CHUNK ? task->length - start : CHUNK;
    const Py_ssize_t e = group * task->cell_group + start;
    for (Py_ssize_t r = 0; r < task->rows; r += ROWS) {
        const Py_ssize_t rows = task->rows - r < ROWS ? task->rows - r : ROWS;
        const Py_ssize_t a = group * task->coefficient_group + r * task->coefficient_row;
        const int64_t *offsets = task->offsets + group * task->rows + r;
        switch (task->code) {
        case 0: MIX(mix_chunk_float32, store_float32, float, float) break;
        case 1: MIX(mix_chunk_float64, store_float64, double, double) break;
        case 2: MIX(mix_chunk_bfloat16, store_float32, float, uint16_t) break;
        default: MIX(mix_chunk_int8, store_float32, float, int8_t)
        }
    }
}

static PyObject *mix(PyObject *module, PyObject *args)
{
    Task task;
    Py_ssize_t out, coefficients, cells, factors, offsets;
    (void)module;
    if (!PyArg_ParseTuple(args, "nnnnninnnnnnnnnnnn", &out, &coefficients, &cells, &factors, &offsets, &task.code,
                          &task.groups, &task.rows, &task.num_cells, &task.length, &task.width, &task.coefficient_group,
                          &task.coefficient_row, &task.cell_group, &task.cell_stride, &task.out_stride,
                          &task.in_stride, &task.channels))
        return NULL;
    task.out = (char *)out;
    task.coefficients = (const char *)coefficients;
    task.cells = (const char *)cells;
    task.factors = (const char *)factors;
    task.offsets = (const int64_t *)offsets;
    const Py_ssize_t chunks = (task.length + CHUNK - 1) / CHUNK, work = task.groups * chunks;
    /* Waking threads costs as much as some 100,000 multiply-adds. */
    const int parallel = (double)task.groups * task.rows * task.num_cells * task.length > 1e5;
    Py_BEGIN_ALLOW_THREADS
    (void)parallel;
#pragma omp parallel for schedule(static) if (parallel)
    for (Py_ssize_t w = 0; w < work; w++) /* Groups change fastest: their results may lie between one another's. */
        mix_columns(&task, w % task.groups, w / task.groups * CHUNK);
    Py_END_ALLOW_THREADS
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

static PyMethodDef methods[] = {
    {"mix", mix, METH_VARARGS,
     "mix(out, coefficients, cells, factors, offsets, code, groups, rows, num_cells, length, width, coefficient_group, "
     "coefficient_row, cell_group, cell_stride, out_stride, in_stride, channels): addresses, then sizes and strides in "
     "elements. Called by kw_timm.layers.mixing alone, which checks them."},
    {"attend", attend, METH_VARARGS,
     "attend(x, first, first_bias, norm_weight, norm_bias, second, second_bias, work, out, batch, channels, pixels, "
     "width, mixtures, logits, epsilon, bases): addresses (work: batch * (channels + width) elements), then sizes. "
     "Called by kw_timm.layers.folded_attention alone, which checks them."},
    {"use_huge_pages", use_huge_pages, METH_VARARGS,
     "use_huge_pages(address, size): have the system back memory that was not yet written by large pages."},
    {NULL, NULL, 0, NULL}};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_mixing", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__mixing(void) { return PyModule_Create(&definition); }
