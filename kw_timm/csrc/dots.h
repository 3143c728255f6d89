/* Dot products of rows with cells, for one type of cells and one instruction set. */
#pragma once
#include "vectors.h"

namespace kw_timm {

template <typename Set, typename Real> struct DotProducts : Vectors<Set, Real> {
    using Base = Vectors<Set, Real>;
    using typename Base::Vector;
    using Base::LANES, Base::load;
    static constexpr int DOT_ROWS = Set::DOT_ROWS, LINES = COLUMN_BYTES / 64;
    static constexpr ptrdiff_t COLUMNS = COLUMN_BYTES / sizeof(Real), STRIDE = DOT_BYTES / sizeof(Real);

    /* Vectors of partial sums, whose lanes are added up at the end. */
    template <int ROWS, int COUNT>
    static void add_tile(Real *dots, ptrdiff_t dot_stride, const Real *left, const Real *right, ptrdiff_t width)
    {
        Vector s[4 * DOT_ROWS] = {};
        Real sums[4 * DOT_ROWS];
        ptrdiff_t c = 0;
        for (; c + LANES <= width; c += LANES) {
            Vector x[COUNT];
            UNROLL for (int j = 0; j < COUNT; j++)
                x[j] = load(right + j * STRIDE + c);
            UNROLL for (int r = 0; r < ROWS; r++) {
                const Vector a = load(left + r * STRIDE + c);
                UNROLL for (int j = 0; j < COUNT; j++)
                    s[4 * r + j] += a * x[j];
            }
        }
        Base::template add_lanes<4 * DOT_ROWS>(sums, s);
        for (int r = 0; r < ROWS; r++)
            for (int j = 0; j < COUNT; j++) {
                for (ptrdiff_t i = c; i < width; i++)
                    sums[4 * r + j] += left[r * STRIDE + i] * right[j * STRIDE + i];
                dots[r * dot_stride + j] += sums[4 * r + j];
            }
    }

    /* Rows are copied: with strides that are powers of two they would push one another out of the caches. */
    static void copy_rows(Real *to, const Real *from, ptrdiff_t stride, ptrdiff_t rows, ptrdiff_t width)
    {
        for (ptrdiff_t r = 0; r < rows; r++)
            memcpy(to + r * STRIDE, from + r * stride, width * sizeof(Real));
    }

    static void add_rows(Real *dots, const Real *left_rows, ptrdiff_t left_stride, ptrdiff_t rows,
                         const Real *right_rows, ptrdiff_t right_stride, ptrdiff_t num_cells, ptrdiff_t width,
                         Real *left)
    {
        Real *right = left + rows * STRIDE;
        copy_rows(left, left_rows, left_stride, rows, width);
        for (ptrdiff_t j = 0; j < num_cells; j += 4) {
            const ptrdiff_t count = num_cells - j < 4 ? num_cells - j : 4;
            const Real *cells = right_rows + j * right_stride;
            copy_rows(right, cells, right_stride, count, width);
            for (ptrdiff_t r = 0; r < rows; r += DOT_ROWS) {
                if (j + 8 <= num_cells) /* Each tile fetches its part of the next four cells. */
                    for (ptrdiff_t line = r * 4 * LINES / rows; line < (r + DOT_ROWS) * 4 * LINES / rows; line++)
                        PREFETCH((const char *)(cells + (4 + line / LINES) * right_stride) + line % LINES * 64);
                Real *to = dots + r * num_cells + j;
                const Real *from = left + r * STRIDE;
                if (count == 4)
                    with_constant<DOT_ROWS>(rows - r, [&](auto constant) {
                        add_tile<constant, 4>(to, num_cells, from, right, width);
                    });
                else
                    for (ptrdiff_t i = 0; i < DOT_ROWS && r + i < rows; i++)
                        for (ptrdiff_t k = 0; k < count; k++)
                            add_tile<1, 1>(to + i * num_cells + k, num_cells, from + i * STRIDE, right + k * STRIDE,
                                           width);
            }
        }
    }

    /* A block of columns, for all rows and cells. */
    static void add_dots(const Dots &d, ptrdiff_t block, void *partial, void *work)
    {
        const ptrdiff_t c = block * COLUMNS, width = d.length - c < COLUMNS ? d.length - c : COLUMNS;
        const ptrdiff_t step = d.row_step();
        for (ptrdiff_t r = 0; r < d.rows; r += step)
            add_rows((Real *)partial + r * d.num_cells, (const Real *)d.left + r * d.left_stride + c, d.left_stride,
                     d.rows - r < step ? d.rows - r : step, (const Real *)d.right + c, d.right_stride, d.num_cells,
                     width, (Real *)work);
    }

    static void add_up(void *to, const void *from, ptrdiff_t count)
    {
        for (ptrdiff_t i = 0; i < count; i++)
            ((Real *)to)[i] += ((const Real *)from)[i];
    }
};

}
