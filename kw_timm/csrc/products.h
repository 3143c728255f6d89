/*
 * The three products of a KW layer on a block of columns, for one type and one instruction set:
 *
 *     mix_few, mix_many:  sums[row][column]   = sum over cells of coefficients[row][cell] * cells[cell][column]
 *     add_dots:           dots[row][cell]    += sum over columns of left[row][column] * cells[cell][column]
 *
 * Included once per type and instruction set, with TYPE (its name), REAL (coefficients, sums, result), INTEGER (as large
 * as REAL) and CELL (how cells are stored) defined, which end with this file; where CELL is not REAL, also LOAD(address)
 * (a vector of cells as REAL) and WIDEN (one). The instruction set defines FUNCTION(name), VECTOR_BYTES and the sizes of
 * the tiles: FEW_ROWS; TILE_ROWS x PANEL_VECTORS; DOT_ROWS. The tiles are as large as the registers allow: what keeps the
 * multiply-add units busy is that few operands come from memory.
 */

#if !defined(LOAD)
#define LOAD(address) VECTOR_AT(address)
#define WIDEN(x) (x)
#endif

#define LANES ((ptrdiff_t)(VECTOR_BYTES / sizeof(REAL)))
#define VECTOR FUNCTION(vector)
#define PANEL (PANEL_VECTORS * LANES)
#define FEW_COLUMNS (COLUMN_BYTES / (ptrdiff_t)sizeof(REAL))
#define MANY_COLUMNS (PANEL_BYTES / (ptrdiff_t)sizeof(REAL))
#define LINES (COLUMN_BYTES / 64)
#define DOT_STRIDE (DOT_BYTES / (ptrdiff_t)sizeof(REAL))

typedef REAL VECTOR __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(REAL)), may_alias));

#define VECTOR_AT(address) (*(VECTOR *)(address))

static ALWAYS_INLINE VECTOR FUNCTION(broadcast)(REAL value) { return (VECTOR){0} + value; }

/* The columns that fill no vector. */
static ALWAYS_INLINE void FUNCTION(add_columns)(const int rows, REAL *sums, const REAL *coefficients,
                                                ptrdiff_t row_count, const CELL *cells, ptrdiff_t cell_stride,
                                                ptrdiff_t count, ptrdiff_t width, int first)
{
    for (ptrdiff_t c = 0; c < width; c++)
        for (int r = 0; r < rows; r++) {
            REAL sum = first ? 0 : sums[r * FEW_COLUMNS + c];
            for (ptrdiff_t j = 0; j < count; j++)
                sum += coefficients[j * row_count + r] * WIDEN(cells[j * cell_stride + c]);
            sums[r * FEW_COLUMNS + c] = sum;
        }
}

/*
 * Up to four rows are limited by reading: four cells at a time are read along many columns and added to sums in the
 * first cache. Up to twelve are limited by arithmetic: sums of a few columns stay in registers while eight cells are added.
 * Cells further on are fetched meanwhile; they lie too far apart for the processor to do so by itself.
 */
static ALWAYS_INLINE void FUNCTION(add_cells)(const int rows, const int count, REAL *sums, const REAL *coefficients,
                                              const CELL *cells, const CELL *next, ptrdiff_t cell_stride,
                                              ptrdiff_t width, const int first)
{
    VECTOR a[4][4];
    ptrdiff_t c = 0;
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int j = 0; j < count; j++)
        a[r][j] = FUNCTION(broadcast)(coefficients[j * rows + r]);
    for (; c + LANES <= width; c += LANES) {
        VECTOR s[4];
        UNROLL for (int r = 0; r < rows; r++)
            s[r] = first ? (VECTOR){0} : VECTOR_AT(sums + r * FEW_COLUMNS + c);
        UNROLL for (int j = 0; j < count; j++)
            PREFETCH(next + j * cell_stride + c);
        UNROLL for (int j = 0; j < count; j++) {
            const VECTOR x = LOAD(cells + j * cell_stride + c);
            UNROLL for (int r = 0; r < rows; r++)
                s[r] += a[r][j] * x;
        }
        UNROLL for (int r = 0; r < rows; r++)
            VECTOR_AT(sums + r * FEW_COLUMNS + c) = s[r];
    }
    FUNCTION(add_columns)(rows, sums + c, coefficients, rows, cells + c, cell_stride, count, width - c, first);
}

static ALWAYS_INLINE void FUNCTION(few_tile)(const int rows, const int vectors, REAL *sums, const REAL *coefficients,
                                             ptrdiff_t row_count, const CELL *cells, const CELL *next,
                                             ptrdiff_t cell_stride, ptrdiff_t count, const int first)
{
    VECTOR s[FEW_ROWS][2];
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int v = 0; v < vectors; v++)
        s[r][v] = first ? (VECTOR){0} : VECTOR_AT(sums + r * FEW_COLUMNS + v * LANES);
    for (ptrdiff_t j = 0; j < count; j++, cells += cell_stride, next += cell_stride, coefficients += row_count) {
        VECTOR x[2];
        UNROLL for (int v = 0; v < vectors; v++) {
            PREFETCH(next + v * LANES);
            x[v] = LOAD(cells + v * LANES);
        }
        UNROLL for (int r = 0; r < rows; r++) {
            const VECTOR a = FUNCTION(broadcast)(coefficients[r]);
            UNROLL for (int v = 0; v < vectors; v++)
                s[r][v] += a * x[v];
        }
    }
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int v = 0; v < vectors; v++)
        VECTOR_AT(sums + r * FEW_COLUMNS + v * LANES) = s[r][v];
}

static ALWAYS_INLINE void FUNCTION(add_rows)(const int rows, REAL *sums, const REAL *coefficients, ptrdiff_t row_count,
                                             const CELL *cells, const CELL *next, ptrdiff_t cell_stride,
                                             ptrdiff_t count, ptrdiff_t width, int first)
{
    ptrdiff_t c = 0;
    for (; c + 2 * LANES <= width; c += 2 * LANES)
        FUNCTION(few_tile)(rows, 2, sums + c, coefficients, row_count, cells + c, next + c, cell_stride, count, first);
    for (; c + LANES <= width; c += LANES)
        FUNCTION(few_tile)(rows, 1, sums + c, coefficients, row_count, cells + c, next + c, cell_stride, count, first);
    FUNCTION(add_columns)(rows, sums + c, coefficients, row_count, cells + c, cell_stride, count, width - c, first);
}

#define CELLS(rows, count)                                                                                             \
    FUNCTION(add_cells)(rows, count, sums, coefficients + j * rows, cells + j * cell_stride, next, cell_stride, width, \
                        j == 0)
#define CASE_OF_CELLS(rows)                                                                                            \
    case rows:                                                                                                         \
        switch (count) {                                                                                               \
        case 1: CELLS(rows, 1); break;                                                                                 \
        case 2: CELLS(rows, 2); break;                                                                                 \
        case 3: CELLS(rows, 3); break;                                                                                 \
        default: CELLS(rows, 4);                                                                                       \
        }                                                                                                              \
        break;
#define CASE_OF_ROWS(rows)                                                                                             \
    case rows:                                                                                                         \
        if (rows <= FEW_ROWS)                                                                                          \
            FUNCTION(add_rows)(rows <= FEW_ROWS ? rows : 1, sums + r * FEW_COLUMNS, coefficients + j * row_count + r,  \
                               row_count, cells + j * cell_stride, next, cell_stride, count, width, j == 0);           \
        break;

/* `coefficients` are packed: for each cell, those of all rows. */
static void FUNCTION(mix_few)(void *to, const void *from, const void *first_cell, ptrdiff_t cell_stride,
                              ptrdiff_t row_count, ptrdiff_t num_cells, ptrdiff_t width, ptrdiff_t ahead)
{
    REAL *sums = to;
    const REAL *coefficients = from;
    const CELL *cells = first_cell;
    const ptrdiff_t most = row_count <= 4 ? 4 : 8, steps = (num_cells + most - 1) / most;
    const ptrdiff_t tiles = (row_count + FEW_ROWS - 1) / FEW_ROWS;
    for (ptrdiff_t step = 0, j = 0, end; step < steps; step++, j = end) {
        end = num_cells * (step + 1) / steps;
        const ptrdiff_t count = end - j, fetched = row_count <= 4 ? end + 4 : end;
        /* Behind the last cell, the first of the next columns. */
        const CELL *next =
            cells + (fetched < num_cells ? fetched * cell_stride : ahead + (fetched - num_cells) * cell_stride);
        switch (row_count) {
            CASE_OF_CELLS(1) CASE_OF_CELLS(2) CASE_OF_CELLS(3) CASE_OF_CELLS(4)
        default:
            for (ptrdiff_t tile = 0, r = 0, stop; tile < tiles; tile++, r = stop) {
                stop = row_count * (tile + 1) / tiles;
                switch (stop - r) {
                    CASE_OF_ROWS(3) CASE_OF_ROWS(4) CASE_OF_ROWS(5) CASE_OF_ROWS(6) CASE_OF_ROWS(7) CASE_OF_ROWS(8)
                    CASE_OF_ROWS(9) CASE_OF_ROWS(10) CASE_OF_ROWS(11) CASE_OF_ROWS(12)
                }
            }
        }
    }
}

/* Many rows: cells are first copied side by side; then sums of some rows stay in registers over many cells. */
static void FUNCTION(pack)(REAL *packed, const CELL *cells, ptrdiff_t cell_stride, ptrdiff_t depth, ptrdiff_t width)
{
    for (ptrdiff_t k = 0; k < depth; k++) {
        const CELL *cell = cells + k * cell_stride;
        for (ptrdiff_t c = 0; c < width; c += PANEL) {
            REAL *to = packed + c * depth + k * PANEL;
            if (c + PANEL <= width)
                UNROLL for (int v = 0; v < PANEL_VECTORS; v++)
                    VECTOR_AT(to + v * LANES) = LOAD(cell + c + v * LANES);
            else
                for (ptrdiff_t i = 0; i < PANEL; i++)
                    to[i] = c + i < width ? WIDEN(cell[c + i]) : 0;
        }
    }
}

static void FUNCTION(many_tile)(REAL *sums, const REAL *coefficients, const REAL *packed, ptrdiff_t depth, int first,
                                const CELL *next, ptrdiff_t next_stride)
{
    VECTOR s[TILE_ROWS][PANEL_VECTORS];
    UNROLL for (int r = 0; r < TILE_ROWS; r++) UNROLL for (int v = 0; v < PANEL_VECTORS; v++)
        s[r][v] = first ? (VECTOR){0} : VECTOR_AT(sums + r * MANY_COLUMNS + v * LANES);
    for (ptrdiff_t k = 0; k < depth; k++) {
        VECTOR x[PANEL_VECTORS];
        PREFETCH(next + k * next_stride);
        UNROLL for (int v = 0; v < PANEL_VECTORS; v++)
            x[v] = VECTOR_AT(packed + k * PANEL + v * LANES);
        UNROLL for (int r = 0; r < TILE_ROWS; r++) {
            const VECTOR a = FUNCTION(broadcast)(coefficients[k * MANY_ROWS + r]);
            UNROLL for (int v = 0; v < PANEL_VECTORS; v++)
                s[r][v] += a * x[v];
        }
    }
    UNROLL for (int r = 0; r < TILE_ROWS; r++) UNROLL for (int v = 0; v < PANEL_VECTORS; v++)
        VECTOR_AT(sums + r * MANY_COLUMNS + v * LANES) = s[r][v];
}

/* `coefficients` are packed: for each eight rows, all cells' coefficients of those; rows are a multiple of eight. */
static void FUNCTION(mix_many)(void *to, const void *from, const void *first_cell, ptrdiff_t cell_stride,
                               ptrdiff_t rows, ptrdiff_t num_cells, ptrdiff_t width, ptrdiff_t ahead, void *space)
{
    REAL *sums = to, *packed = space;
    const REAL *coefficients = from;
    const CELL *cells = first_cell;
    const ptrdiff_t blocks = (num_cells + DEPTH - 1) / DEPTH;
    for (ptrdiff_t block = 0, k = 0, end; block < blocks; block++, k = end) {
        end = num_cells * (block + 1) / blocks;
        const ptrdiff_t depth = end - k;
        /* Each tile fetches one line of the cells after these; behind the last, of the first ones' next columns. */
        const CELL *next = cells + (end < num_cells ? end * cell_stride : ahead);
        ptrdiff_t fetched = 0;
        FUNCTION(pack)(packed, cells + k * cell_stride, cell_stride, depth, width);
        for (ptrdiff_t r = 0; r < rows; r += TILE_ROWS)
            for (ptrdiff_t c = 0; c < width; c += PANEL, fetched += 64 / (ptrdiff_t)sizeof(CELL))
                FUNCTION(many_tile)(sums + r * MANY_COLUMNS + c,
                                    coefficients + (r - r % MANY_ROWS) * num_cells + k * MANY_ROWS + r % MANY_ROWS,
                                    packed + c * depth, depth, k == 0, fetched < width ? next + fetched : cells,
                                    fetched < width ? cell_stride : 0);
    }
}

/* Sums over columns: vectors of partial sums, whose lanes are added up at the end, two vectors' into one. */
typedef INTEGER FUNCTION(indices) __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(INTEGER)), may_alias));

#define EVEN(d, lane) ((lane) & (d) ? (lane) - (d) + LANES : (lane))
#define ODD(d, lane) ((lane) & (d) ? (lane) + LANES : (lane) + (d))
static const INTEGER FUNCTION(even)[][16] = {EACH_LANE(EVEN, 1), EACH_LANE(EVEN, 2), EACH_LANE(EVEN, 4),
                                             EACH_LANE(EVEN, 8)};
static const INTEGER FUNCTION(odd)[][16] = {EACH_LANE(ODD, 1), EACH_LANE(ODD, 2), EACH_LANE(ODD, 4), EACH_LANE(ODD, 8)};

static ALWAYS_INLINE void FUNCTION(add_lanes)(REAL *sums, VECTOR *s)
{
    int count = 4 * DOT_ROWS;
#if defined(__clang__)
    for (int i = 0; i < count; i++) {
        sums[i] = 0;
        for (int lane = 0; lane < LANES; lane++)
            sums[i] += s[i][lane];
    }
#else
    UNROLL for (int level = 0; 1 << level < LANES; level++) {
        const FUNCTION(indices) even = *(const FUNCTION(indices) *)FUNCTION(even)[level];
        const FUNCTION(indices) odd = *(const FUNCTION(indices) *)FUNCTION(odd)[level];
        count /= 2;
        UNROLL for (int i = 0; i < count; i++)
            s[i] = __builtin_shuffle(s[2 * i], s[2 * i + 1], even) + __builtin_shuffle(s[2 * i], s[2 * i + 1], odd);
    }
    UNROLL for (int i = 0; i < count; i++)
        VECTOR_AT(sums + i * LANES) = s[i];
#endif
}

static ALWAYS_INLINE void FUNCTION(dot_tile)(const int rows, const int count, REAL *dots, ptrdiff_t dot_stride,
                                             const REAL *left, const REAL *right, ptrdiff_t width)
{
    VECTOR s[4 * DOT_ROWS];
    REAL sums[4 * DOT_ROWS];
    ptrdiff_t c = 0;
    UNROLL for (int i = 0; i < 4 * DOT_ROWS; i++)
        s[i] = (VECTOR){0};
    for (; c + LANES <= width; c += LANES) {
        VECTOR x[4];
        UNROLL for (int j = 0; j < count; j++)
            x[j] = VECTOR_AT(right + j * DOT_STRIDE + c);
        UNROLL for (int r = 0; r < rows; r++) {
            const VECTOR a = VECTOR_AT(left + r * DOT_STRIDE + c);
            UNROLL for (int j = 0; j < count; j++)
                s[4 * r + j] += a * x[j];
        }
    }
    FUNCTION(add_lanes)(sums, s);
    for (int r = 0; r < rows; r++)
        for (int j = 0; j < count; j++) {
            for (ptrdiff_t i = c; i < width; i++)
                sums[4 * r + j] += left[r * DOT_STRIDE + i] * right[j * DOT_STRIDE + i];
            dots[r * dot_stride + j] += sums[4 * r + j];
        }
}

/* Rows are copied: with strides that are powers of two they would push one another out of the caches. */
static void FUNCTION(copy_rows)(REAL *to, const REAL *from, ptrdiff_t stride, ptrdiff_t rows, ptrdiff_t width)
{
    for (ptrdiff_t r = 0; r < rows; r++)
        memcpy(to + r * DOT_STRIDE, from + r * stride, width * sizeof(REAL));
}

static void FUNCTION(add_dots)(void *sums, const void *left_rows, ptrdiff_t left_stride, ptrdiff_t rows,
                               const void *right_rows, ptrdiff_t right_stride, ptrdiff_t num_cells, ptrdiff_t width,
                               void *space)
{
    REAL *dots = sums, *left = space, *right = left + rows * DOT_STRIDE;
    FUNCTION(copy_rows)(left, left_rows, left_stride, rows, width);
    for (ptrdiff_t j = 0; j < num_cells; j += 4) {
        const ptrdiff_t count = num_cells - j < 4 ? num_cells - j : 4;
        const REAL *cells = (const REAL *)right_rows + j * right_stride;
        FUNCTION(copy_rows)(right, cells, right_stride, count, width);
        for (ptrdiff_t r = 0; r < rows; r += DOT_ROWS) {
            if (j + 8 <= num_cells) /* Each tile fetches its part of the next four cells. */
                for (ptrdiff_t line = r * 4 * LINES / rows; line < (r + DOT_ROWS) * 4 * LINES / rows; line++)
                    PREFETCH((const char *)(cells + (4 + line / LINES) * right_stride) + line % LINES * 64);
            REAL *to = dots + r * num_cells + j;
            const REAL *from = left + r * DOT_STRIDE;
            switch (count < 4 ? 0 : rows - r < DOT_ROWS ? rows - r : DOT_ROWS) {
#if DOT_ROWS == 4
            case 4: FUNCTION(dot_tile)(4, 4, to, num_cells, from, right, width); break;
            case 3: FUNCTION(dot_tile)(3, 4, to, num_cells, from, right, width); break;
#endif
            case 2: FUNCTION(dot_tile)(2, 4, to, num_cells, from, right, width); break;
            case 1: FUNCTION(dot_tile)(1, 4, to, num_cells, from, right, width); break;
            default:
                for (ptrdiff_t i = 0; i < DOT_ROWS && r + i < rows; i++)
                    for (ptrdiff_t k = 0; k < count; k++)
                        FUNCTION(dot_tile)(1, 1, to + i * num_cells + k, num_cells, from + i * DOT_STRIDE,
                                           right + k * DOT_STRIDE, width);
            }
        }
    }
}

#undef LANES
#undef VECTOR
#undef PANEL
#undef FEW_COLUMNS
#undef MANY_COLUMNS
#undef LINES
#undef DOT_STRIDE
#undef VECTOR_AT
#undef EVEN
#undef ODD
#undef CELLS
#undef CASE_OF_CELLS
#undef CASE_OF_ROWS
#undef TYPE
#undef REAL
#undef INTEGER
#undef CELL
#undef LOAD
#undef WIDEN
