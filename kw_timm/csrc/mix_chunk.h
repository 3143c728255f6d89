/*
 * One chunk of columns: out[row][column] = sum over cells of coefficients[row][cell] * cells[cell][column].
 *
 * Included once per type, with REAL (coefficients, sums, result), CELL (how cells are stored), LOAD (CELL to REAL) and
 * MIX_CHUNK (the function's name) defined.
 *
 * Eight cells and four rows are taken at a time: eight loads of cells then serve 32 multiply-adds, and sums move to
 * and from the first cache once per eight cells. The eight cells after those are fetched meanwhile; they lie too far
 * apart for the processor to do so by itself.
 */

#define TERM(row, k) a##row[k] * x##k
#define SUM(row)                                                                                                     \
    TERM(row, 0) + TERM(row, 1) + TERM(row, 2) + TERM(row, 3) + TERM(row, 4) + TERM(row, 5) + TERM(row, 6) +         \
        TERM(row, 7)
#define ROW(row)                                                                                                     \
    REAL *restrict s##row = sums + (r + row) * CHUNK;                                                                \
    REAL a##row[STEP];                                                                                               \
    for (int k = 0; k < STEP; k++)                                                                                   \
        a##row[k] = k < left ? coefficients[(r + row) * row_stride + j + k] : 0;
#define CELL_AT(k) (cells + (j + (k < left ? k : left - 1)) * cell_stride)
#define CELLS                                                                                                        \
    const REAL x0 = LOAD(e0[c]), x1 = LOAD(e1[c]), x2 = LOAD(e2[c]), x3 = LOAD(e3[c]), x4 = LOAD(e4[c]),             \
               x5 = LOAD(e5[c]), x6 = LOAD(e6[c]), x7 = LOAD(e7[c]);

CLONES
static void MIX_CHUNK(REAL *restrict sums, const REAL *restrict coefficients, ptrdiff_t row_stride,
                      const CELL *restrict cells, ptrdiff_t cell_stride, ptrdiff_t rows, ptrdiff_t num_cells,
                      ptrdiff_t width)
{
    memset(sums, 0, rows * CHUNK * sizeof(REAL));
    for (ptrdiff_t j = 0; j < num_cells; j += STEP) {
        const ptrdiff_t left = num_cells - j; /* With fewer than eight left, the last one stands in, times zero. */
        const CELL *restrict e0 = CELL_AT(0), *restrict e1 = CELL_AT(1), *restrict e2 = CELL_AT(2),
                   *restrict e3 = CELL_AT(3), *restrict e4 = CELL_AT(4), *restrict e5 = CELL_AT(5),
                   *restrict e6 = CELL_AT(6), *restrict e7 = CELL_AT(7);
        for (ptrdiff_t k = STEP; k < left && k < 2 * STEP; k++)
            for (ptrdiff_t c = 0; c < width; c += 64 / sizeof(CELL))
                PREFETCH(cells + (j + k) * cell_stride + c);
        ptrdiff_t r = 0;
        for (; r + 4 <= rows; r += 4) {
            ROW(0) ROW(1) ROW(2) ROW(3)
            for (ptrdiff_t c = 0; c < width; c++) {
                CELLS
                s0[c] += SUM(0);
                s1[c] += SUM(1);
                s2[c] += SUM(2);
                s3[c] += SUM(3);
            }
        }
        for (; r < rows; r++) {
            ROW(0)
            for (ptrdiff_t c = 0; c < width; c++) {
                CELLS
                s0[c] += SUM(0);
            }
        }
    }
}

#undef TERM
#undef SUM
#undef ROW
#undef CELL_AT
#undef CELLS
#undef REAL
#undef CELL
#undef LOAD
#undef MIX_CHUNK
