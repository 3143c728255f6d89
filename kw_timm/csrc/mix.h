/*
 * Mixtures of cells, for one type of cells and one instruction set. Every cell is read once for all rows.
 *
 * The tiles (Set::FEW_ROWS; Set::TILE_ROWS x Set::PANEL_VECTORS) are as large as the registers allow: what keeps the
 * multiply-add units busy is that few operands come from memory.
 */
#pragma once
#include "vectors.h"

namespace kw_timm {

template <typename Set, typename Cell> struct Mix : Vectors<Set, Cell> {
    using Base = Vectors<Set, Cell>;
    using typename Base::Real, typename Base::Vector;
    using Base::broadcast, Base::LANES, Base::load, Base::store, Base::widen;
    static constexpr int PANEL_VECTORS = Set::PANEL_VECTORS, PANEL = PANEL_VECTORS * LANES, TILE_ROWS = Set::TILE_ROWS;
    static constexpr ptrdiff_t FEW_COLUMNS = COLUMN_BYTES / sizeof(Real), MANY_COLUMNS = PANEL_BYTES / sizeof(Real);

    /* `next` is fetched meanwhile: cells lie too far apart for the processor to do so by itself. */
    struct Cells {
        const Cell *cells, *next;
        ptrdiff_t stride;

        Cells behind(ptrdiff_t columns) const { return {cells + columns, next + columns, stride}; }
    };

    /* The columns that fill no vector. */
    template <int ROWS>
    static ALWAYS_INLINE void add_columns(Real *sums, const Real *coefficients, ptrdiff_t row_count, Cells from,
                                          ptrdiff_t count, ptrdiff_t width, bool first)
    {
        for (ptrdiff_t c = 0; c < width; c++)
            for (int r = 0; r < ROWS; r++) {
                Real sum = first ? 0 : sums[r * FEW_COLUMNS + c];
                for (ptrdiff_t j = 0; j < count; j++)
                    sum += coefficients[j * row_count + r] * widen(from.cells[j * from.stride + c]);
                sums[r * FEW_COLUMNS + c] = sum;
            }
    }

    /*
     * Up to four rows are limited by reading: four cells at a time are read along many columns and added to sums in the
     * first cache.
     */
    template <int ROWS, int COUNT>
    static void add_cells(Real *sums, const Real *coefficients, Cells from, ptrdiff_t width, bool first)
    {
        Vector a[ROWS][COUNT];
        ptrdiff_t c = 0;
        for (int r = 0; first && r < ROWS; r++)
            memset(sums + r * FEW_COLUMNS, 0, width * sizeof(Real));
        UNROLL for (int r = 0; r < ROWS; r++) UNROLL for (int j = 0; j < COUNT; j++)
            a[r][j] = broadcast(coefficients[j * ROWS + r]);
        for (; c + LANES <= width; c += LANES) {
            Vector s[ROWS];
            UNROLL for (int r = 0; r < ROWS; r++)
                s[r] = load(sums + r * FEW_COLUMNS + c);
            UNROLL for (int j = 0; j < COUNT; j++)
                PREFETCH(from.next + j * from.stride + c);
            UNROLL for (int j = 0; j < COUNT; j++) {
                const Vector x = load(from.cells + j * from.stride + c);
                UNROLL for (int r = 0; r < ROWS; r++)
                    s[r] += a[r][j] * x;
            }
            UNROLL for (int r = 0; r < ROWS; r++)
                store(sums + r * FEW_COLUMNS + c, s[r]);
        }
        add_columns<ROWS>(sums + c, coefficients, ROWS, from.behind(c), COUNT, width - c, false);
    }

    /* Up to twelve are limited by arithmetic: sums of a few columns stay in registers while eight cells are added. */
    template <int ROWS, int VECTORS>
    static ALWAYS_INLINE void few_tile(Real *sums, const Real *coefficients, ptrdiff_t row_count, Cells from,
                                       ptrdiff_t count, bool first)
    {
        Vector s[ROWS][VECTORS];
        UNROLL for (int r = 0; r < ROWS; r++) UNROLL for (int v = 0; v < VECTORS; v++)
            s[r][v] = first ? Vector{} : load(sums + r * FEW_COLUMNS + v * LANES);
        for (ptrdiff_t j = 0; j < count; j++, from = from.behind(from.stride), coefficients += row_count) {
            Vector x[VECTORS];
            UNROLL for (int v = 0; v < VECTORS; v++) {
                PREFETCH(from.next + v * LANES);
                x[v] = load(from.cells + v * LANES);
            }
            UNROLL for (int r = 0; r < ROWS; r++) {
                const Vector a = broadcast(coefficients[r]);
                UNROLL for (int v = 0; v < VECTORS; v++)
                    s[r][v] += a * x[v];
            }
        }
        UNROLL for (int r = 0; r < ROWS; r++) UNROLL for (int v = 0; v < VECTORS; v++)
            store(sums + r * FEW_COLUMNS + v * LANES, s[r][v]);
    }

    template <int ROWS>
    static void add_rows(Real *sums, const Real *coefficients, ptrdiff_t row_count, Cells from, ptrdiff_t count,
                         ptrdiff_t width, bool first)
    {
        ptrdiff_t c = 0;
        for (; c + 2 * LANES <= width; c += 2 * LANES)
            few_tile<ROWS, 2>(sums + c, coefficients, row_count, from.behind(c), count, first);
        for (; c + LANES <= width; c += LANES)
            few_tile<ROWS, 1>(sums + c, coefficients, row_count, from.behind(c), count, first);
        add_columns<ROWS>(sums + c, coefficients, row_count, from.behind(c), count, width - c, first);
    }

    /* `coefficients` are packed: for each cell, those of all rows. */
    static void mix_few(Real *sums, const Real *coefficients, const Cell *cells, ptrdiff_t stride, ptrdiff_t row_count,
                        ptrdiff_t num_cells, ptrdiff_t width, ptrdiff_t ahead)
    {
        const ptrdiff_t most = row_count <= 4 ? 4 : 8, steps = (num_cells + most - 1) / most;
        const ptrdiff_t tiles = (row_count + Set::FEW_ROWS - 1) / Set::FEW_ROWS;
        for (ptrdiff_t step = 0, j = 0, end; step < steps; step++, j = end) {
            end = num_cells * (step + 1) / steps;
            const ptrdiff_t count = end - j, fetched = row_count <= 4 ? end + 4 : end;
            /* Behind the last cell, the first of the next columns. */
            const ptrdiff_t next = fetched < num_cells ? fetched * stride : ahead + (fetched - num_cells) * stride;
            const Cells from = {cells + j * stride, cells + next, stride};
            if (row_count <= 4)
                with_constant<4>(row_count, [&](auto rows) {
                    with_constant<4>(count, [&](auto constant) {
                        add_cells<rows, constant>(sums, coefficients + j * rows, from, width, j == 0);
                    });
                });
            else
                for (ptrdiff_t tile = 0, r = 0, stop; tile < tiles; tile++, r = stop) {
                    stop = row_count * (tile + 1) / tiles;
                    with_constant<Set::FEW_ROWS>(stop - r, [&](auto rows) {
                        add_rows<rows>(sums + r * FEW_COLUMNS, coefficients + j * row_count + r, row_count, from, count,
                                       width, j == 0);
                    });
                }
        }
    }

    /* Many rows: cells are first copied side by side; then sums of some rows stay in registers over many cells. */
    static void copy_cells(Real *packed, const Cell *cells, ptrdiff_t stride, ptrdiff_t depth, ptrdiff_t width)
    {
        for (ptrdiff_t k = 0; k < depth; k++, cells += stride)
            for (ptrdiff_t c = 0; c < width; c += PANEL) {
                Real *to = packed + c * depth + k * PANEL;
                if (c + PANEL <= width)
                    UNROLL for (int v = 0; v < PANEL_VECTORS; v++)
                        store(to + v * LANES, load(cells + c + v * LANES));
                else
                    for (ptrdiff_t i = 0; i < PANEL; i++)
                        to[i] = c + i < width ? widen(cells[c + i]) : 0;
            }
    }

    static void many_tile(Real *sums, const Real *coefficients, const Real *packed, ptrdiff_t depth, bool first,
                          const Cell *next, ptrdiff_t next_stride)
    {
        Vector s[TILE_ROWS][PANEL_VECTORS];
        UNROLL for (int r = 0; r < TILE_ROWS; r++) UNROLL for (int v = 0; v < PANEL_VECTORS; v++)
            s[r][v] = first ? Vector{} : load(sums + r * MANY_COLUMNS + v * LANES);
        for (ptrdiff_t k = 0; k < depth; k++) {
            Vector x[PANEL_VECTORS];
            PREFETCH(next + k * next_stride);
            UNROLL for (int v = 0; v < PANEL_VECTORS; v++)
                x[v] = load(packed + k * PANEL + v * LANES);
            UNROLL for (int r = 0; r < TILE_ROWS; r++) {
                const Vector a = broadcast(coefficients[k * MANY_ROWS + r]);
                UNROLL for (int v = 0; v < PANEL_VECTORS; v++)
                    s[r][v] += a * x[v];
            }
        }
        UNROLL for (int r = 0; r < TILE_ROWS; r++) UNROLL for (int v = 0; v < PANEL_VECTORS; v++)
            store(sums + r * MANY_COLUMNS + v * LANES, s[r][v]);
    }

    /* `coefficients` are packed: for each eight rows, all cells' coefficients of those. `packed` is room for cells. */
    static void mix_many(Real *sums, const Real *coefficients, const Cell *cells, ptrdiff_t stride, ptrdiff_t rows,
                         ptrdiff_t num_cells, ptrdiff_t width, ptrdiff_t ahead, Real *packed)
    {
        const ptrdiff_t blocks = (num_cells + DEPTH - 1) / DEPTH;
        for (ptrdiff_t block = 0, k = 0, end; block < blocks; block++, k = end) {
            end = num_cells * (block + 1) / blocks;
            const ptrdiff_t depth = end - k;
            /* Each tile fetches one line of the cells after these; behind the last, of the first ones' next columns. */
            const Cell *next = cells + (end < num_cells ? end * stride : ahead);
            ptrdiff_t fetched = 0;
            copy_cells(packed, cells + k * stride, stride, depth, width);
            for (ptrdiff_t r = 0; r < rows; r += TILE_ROWS)
                for (ptrdiff_t c = 0; c < width; c += PANEL, fetched += 64 / sizeof(Cell))
                    many_tile(sums + r * MANY_COLUMNS + c,
                              coefficients + (r - r % MANY_ROWS) * num_cells + k * MANY_ROWS + r % MANY_ROWS,
                              packed + c * depth, depth, k == 0, fetched < width ? next + fetched : cells,
                              fetched < width ? stride : 0);
        }
    }

    /* Store some rows of sums, whose elements alternate in the result, the columns [start, start + width) by line. */
    static void store_rows(const Mixing &m, Real *__restrict sums, ptrdiff_t columns, ptrdiff_t rows, ptrdiff_t offset,
                           ptrdiff_t start, ptrdiff_t width)
    {
        const Real *factors = (const Real *)m.factors;
        for (ptrdiff_t c = 0, length; c < width; c += length) {
            const ptrdiff_t line = (start + c) / m.width, i = (start + c) % m.width, step = m.in_stride;
            Real *__restrict to = (Real *)m.out + offset + line * m.out_stride + i * step;
            length = m.width - i < width - c ? m.width - i : width - c;
            if (factors) {
                const Real factor = factors[offset / m.out_stride % m.channels + line];
                for (ptrdiff_t row = 0; row < rows; row++)
                    for (ptrdiff_t k = 0; k < length; k++)
                        sums[row * columns + c + k] *= factor;
            }
            if (step == 1 && !m.add)
                memcpy(to, sums + c, length * sizeof(Real));
            else if (step == 1)
                for (ptrdiff_t k = 0; k < length; k++)
                    to[k] += sums[c + k];
            else if (!m.add)
                for (ptrdiff_t k = 0; k < length; k++)
                    for (ptrdiff_t row = 0; row < rows; row++)
                        to[k * step + row] = sums[row * columns + c + k];
            else
                for (ptrdiff_t row = 0; row < rows; row++)
                    for (ptrdiff_t k = 0; k < length; k++)
                        to[k * step + row] += sums[row * columns + c + k];
        }
    }

    /* A group's coefficients in the order in which the tiles take them: cell by cell, some rows side by side. */
    static void pack(const Mixing &m, ptrdiff_t group)
    {
        const ptrdiff_t side = m.side_by_side(), rows = m.packed_rows();
        const Real *from = (const Real *)m.coefficients + group * m.coefficient_group;
        Real *to = (Real *)m.packed + group * rows * m.num_cells;
        for (ptrdiff_t r = 0; r < rows; r++, from += m.coefficient_row)
            for (ptrdiff_t j = 0; j < m.num_cells; j++)
                to[(r / side * m.num_cells + j) * side + r % side] = r < m.rows ? from[j * m.coefficient_cell] : 0;
    }

    /* A block of columns of one group's cells, for all rows. */
    static void mix(const Mixing &m, ptrdiff_t group, ptrdiff_t block, void *work)
    {
        const bool many = m.has_many_rows();
        const ptrdiff_t columns = many ? MANY_COLUMNS : FEW_COLUMNS, row_step = many ? MOST_ROWS : MANY_FROM;
        const ptrdiff_t start = block * columns, left = m.length - start, width = left < columns ? left : columns;
        const ptrdiff_t ahead = left > width ? width : 0;
        const Cell *cells = (const Cell *)m.cells + group * m.cell_group + start;
        Real *all_sums = (Real *)work;
        if (!m.num_cells)
            memset(work, 0, m.work_bytes());
        for (ptrdiff_t r = 0; r < m.rows; r += row_step) {
            const ptrdiff_t rows = m.rows - r < row_step ? m.rows - r : row_step;
            const int64_t *offsets = m.offsets + group * m.rows + r;
            const Real *coefficients = (const Real *)m.packed + (group * m.packed_rows() + r) * m.num_cells;
            if (many)
                mix_many(all_sums, coefficients, cells, m.cell_stride, rows, m.num_cells, width, ahead,
                         all_sums + MOST_ROWS * MANY_COLUMNS);
            else
                mix_few(all_sums, coefficients, cells, m.cell_stride, rows, m.num_cells, width, ahead);
            for (ptrdiff_t row = 0, count; row < rows; row += count) {
                for (count = 1; count < m.in_stride && row + count < rows; count++)
                    if (offsets[row + count] != offsets[row] + count)
                        break;
                if (m.add && row + 4 < rows) /* Rows lie far apart: the processor does not foresee the next ones. */
                    for (ptrdiff_t c = 0; c < width; c += 64 / sizeof(Real))
                        __builtin_prefetch((Real *)m.out + offsets[row + 4] + start + c, 1, 2);
                store_rows(m, all_sums + row * columns, columns, count, offsets[row], start, width);
            }
        }
    }
};

}
