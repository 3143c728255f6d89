/* What the module hands to the code for one instruction set, and the sizes on which both rely. */
#pragma once
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <type_traits>
#include <utility>

#if !defined(__GNUC__)
#error "The vector types are those of GCC and Clang. Without this module torch's operations are used."
#endif

namespace kw_timm {

constexpr ptrdiff_t COLUMN_BYTES = 2048; /* of a cell at a time, with few rows: four cells' share and their sums fit the
                                            first cache */
constexpr ptrdiff_t DOT_BYTES = COLUMN_BYTES + 64; /* from one copied row to the next */
constexpr ptrdiff_t PANEL_BYTES = 960; /* of a cell at a time, with many rows: a multiple of every set's panels */
constexpr ptrdiff_t DEPTH = 256;       /* cells copied side by side at a time: their share fits the second cache */
constexpr ptrdiff_t MOST_ROWS = 288;   /* of which sums are kept in the second cache */
constexpr ptrdiff_t MANY_ROWS = 8;     /* whose coefficients lie side by side */
constexpr ptrdiff_t MANY_FROM = 28;    /* from so many rows on, copying the cells pays */

/*
 * out[g, r](o, i) = sum over j of coefficients[g, r, j] * cells[g, j, o, i]
 *
 * is stored at out + offsets[g, r] + o * out_stride + i * in_stride (in elements), times the factor of the output
 * channel if there are factors. Source of the method: arXiv 2406.07879, section 3.
 */
struct Mixing {
    void *out;
    const void *coefficients, *cells, *factors; /* factors: per output channel, or NULL */
    const int64_t *offsets;
    ptrdiff_t code, add, groups, rows, num_cells, length, width; /* a cell has `length` elements, in lines of `width` */
    ptrdiff_t coefficient_group, coefficient_row, coefficient_cell, cell_group, cell_stride;
    ptrdiff_t out_stride, in_stride, channels;
    void *packed; /* room for the coefficients, in the order in which they are needed */

    bool has_many_rows() const { return rows >= MANY_FROM; }
    ptrdiff_t column_bytes() const { return has_many_rows() ? PANEL_BYTES : COLUMN_BYTES; }
    ptrdiff_t work_bytes() const
    {
        return has_many_rows() ? (MOST_ROWS + DEPTH) * PANEL_BYTES : MANY_FROM * COLUMN_BYTES;
    }
    /* How many rows' coefficients lie side by side when they are packed. */
    ptrdiff_t side_by_side() const { return has_many_rows() ? MANY_ROWS : rows; }
    ptrdiff_t packed_rows() const { return (rows + side_by_side() - 1) / side_by_side() * side_by_side(); }
};

/* dots[row][cell] += sum over columns of left[row][column] * right[cell][column] */
struct Dots {
    void *dots;
    const void *left, *right;
    ptrdiff_t code, rows, num_cells, length, left_stride, right_stride;

    ptrdiff_t row_step() const { return rows < MOST_ROWS ? rows : MOST_ROWS; }
    ptrdiff_t work_bytes() const { return (row_step() + 4) * DOT_BYTES; }
};

/* See attention.h. */
struct Attention {
    const float *x, *first, *first_bias, *norm_weight, *norm_bias, *second, *second_bias;
    float *pooled, *out;
    ptrdiff_t batch, channels, pixels, width, mixtures, logits; /* logits: cells + 1 */
    float epsilon;
    ptrdiff_t bases;
    float *hidden;
};

/* The code for one type of cells. Blocks are of as many columns as fit column_bytes, or COLUMN_BYTES for dots. */
struct Products {
    ptrdiff_t real_size; /* of coefficients and sums, in bytes */
    void (*pack)(const Mixing &, ptrdiff_t group);
    void (*mix)(const Mixing &, ptrdiff_t group, ptrdiff_t block, void *work);
    void (*add_dots)(const Dots &, ptrdiff_t block, void *partial, void *work);
    void (*add_up)(void *to, const void *from, ptrdiff_t count);
};

struct InstructionSet {
    ptrdiff_t vector_bytes;
    Products products[4]; /* by the codes of the types: float32, float64, bfloat16, int8 */
    float (*mean)(const float *, ptrdiff_t count);
    void (*hide)(const Attention &, ptrdiff_t sample);
    void (*attend)(const Attention &, ptrdiff_t sample, ptrdiff_t mixture, float *logits);
};

extern const InstructionSet any_set, avx2_set, avx512_set;

}
