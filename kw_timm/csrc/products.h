/*
 * The three products of a KW layer on a block of columns, for one type and one instruction set:
 *
 *     mix_few, mix_many:  sums[row][column]   = sum over cells of coefficients[row][cell] * cells[cell][column]
 *     add_dots:           dots[row][cell]    += sum over columns of left[row][column] * cells[cell][column]
 *
 * Included once per type and instruction set, with REAL (coefficients, sums, result), CELL (how cells are stored),
 * LOAD(address) (a vector of cells as REAL), FUNCTION(name), VECTOR_BYTES and PANEL_VECTORS defined. The tiles are as
 * large as the registers allow: what keeps the multiply-add units busy is that few operands come from memory.
 */

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

/* Few rows: sums stay in the first cache while four cells at a time are added; cells further on are fetched. */
static ALWAYS_INLINE void FUNCTION(few_tile)(const int rows, const int count, const int fetched, REAL *sums,
                                             const REAL *coefficients, ptrdiff_t row_stride, const CELL *cells,
                                             ptrdiff_t cell_stride, ptrdiff_t width, const int first,
                                             const CELL *const *next)
{
    VECTOR a[4][4];
    ptrdiff_t c = 0;
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int j = 0; j < count; j++)
        a[r][j] = FUNCTION(broadcast)(coefficients[r * row_stride + j]);
    for (; c + LANES <= width; c += LANES) {
        VECTOR s[4];
        UNROLL for (int r = 0; r < rows; r++)
            s[r] = first ? (VECTOR){0} : VECTOR_AT(sums + r * FEW_COLUMNS + c);
        UNROLL for (int j = 0; j < fetched; j++)
            PREFETCH(next[j] + c);
        UNROLL for (int j = 0; j < count; j++) {
            const VECTOR x = LOAD(cells + j * cell_stride + c);
            UNROLL for (int r = 0; r < rows; r++)
                s[r] += a[r][j] * x;
        }
        UNROLL for (int r = 0; r < rows; r++)
            VECTOR_AT(sums + r * FEW_COLUMNS + c) = s[r];
    }
    for (; c < width; c++)
        for (int r = 0; r < rows; r++) {
            REAL sum = first ? 0 : sums[r * FEW_COLUMNS + c];
            for (int j = 0; j < count; j++)
                sum += coefficients[r * row_stride + j] * WIDEN(cells[j * cell_stride + c]);
            sums[r * FEW_COLUMNS + c] = sum;
        }
}

#define FEW_TILE(rows, count, fetched)                                                                                 \
    FUNCTION(few_tile)(rows, count, fetched, sums + r * FEW_COLUMNS, coefficients + r * row_stride + j, row_stride,    \
                       cells + j * cell_stride, cell_stride, width, j == 0, next)
#define FEW_TILES(count, fetched)                                                                                      \
    switch (tile) {                                                                                                    \
    case 1: FEW_TILE(1, count, fetched); break;                                                                        \
    case 2: FEW_TILE(2, count, fetched); break;                                                                        \
    case 3: FEW_TILE(3, count, fetched); break;                                                                        \
    default: FEW_TILE(4, count, fetched);                                                                              \
    }
#define FEW_STEP(fetched)                                                                                              \
    switch (count) {                                                                                                   \
    case 1: FEW_TILES(1, fetched) break;                                                                               \
    case 2: FEW_TILES(2, fetched) break;                                                                               \
    case 3: FEW_TILES(3, fetched) break;                                                                               \
    default: FEW_TILES(4, fetched)                                                                                     \
    }

static void FUNCTION(mix_few)(void *to, const void *from, ptrdiff_t row_stride, const void *first_cell,
                              ptrdiff_t cell_stride, ptrdiff_t rows, ptrdiff_t num_cells, ptrdiff_t width,
                              ptrdiff_t ahead)
{
    REAL *sums = to;
    const REAL *coefficients = from;
    const CELL *cells = first_cell;
    const ptrdiff_t steps = (num_cells + 3) / 4, tiles = (rows + FEW_ROWS - 1) / FEW_ROWS;
    for (ptrdiff_t step = 0; step < steps; step++) {
        const ptrdiff_t j = num_cells * step / steps, count = num_cells * (step + 1) / steps - j;
        const CELL *next[4];
        for (ptrdiff_t k = 0; k < 4; k++) { /* Behind the last cell, the first of the next columns. */
            const ptrdiff_t cell = j + FETCH_AHEAD + k;
            next[k] = cells + (cell < num_cells ? cell * cell_stride : ahead + cell % num_cells * cell_stride);
        }
        for (ptrdiff_t t = 0; t < tiles; t++) {
            const ptrdiff_t r = rows * t / tiles, tile = rows * (t + 1) / tiles - r;
            if (t == 0)
                FEW_STEP(4)
            else
                FEW_STEP(0)
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
                                    coefficients + r / MANY_ROWS * MANY_ROWS * num_cells + k * MANY_ROWS + r % MANY_ROWS,
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
            case 4: FUNCTION(dot_tile)(DOT_ROWS, 4, to, num_cells, from, right, width); break;
#if DOT_ROWS == 4
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
#undef FEW_TILE
#undef FEW_TILES
#undef FEW_STEP
