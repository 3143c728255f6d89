/*
 * The products for every type, in one instruction set. Included once per instruction set, with SET(name),
 * VECTOR_BYTES, PANEL_VECTORS, TILE_ROWS, FEW_ROWS and DOT_ROWS defined.
 */

#define JOIN_(name, type) SET(name##_##type)
#define JOIN(name, type) JOIN_(name, type)
#define FUNCTION(name) JOIN(name, TYPE)

#define REAL float
#define INTEGER int32_t
#define TYPE float32
#define CELL float
#include "products.h"

typedef uint32_t SET(words) __attribute__((vector_size(VECTOR_BYTES)));
typedef uint16_t SET(halves) __attribute__((vector_size(VECTOR_BYTES / 2), aligned(2), may_alias));
typedef int8_t SET(bytes) __attribute__((vector_size(VECTOR_BYTES / 4), aligned(1), may_alias));

#define REAL float
#define INTEGER int32_t
#define TYPE bfloat16
#define CELL uint16_t
#define WIDEN(x) widen_bfloat16(x)
#define LOAD(address) ((FUNCTION(vector))(__builtin_convertvector(*(const SET(halves) *)(address), SET(words)) << 16))
#include "products.h"

#define REAL float
#define INTEGER int32_t
#define TYPE int8
#define CELL int8_t
#define WIDEN(x) ((float)(x))
#define LOAD(address) __builtin_convertvector(*(const SET(bytes) *)(address), FUNCTION(vector))
#include "products.h"

#define REAL double
#define INTEGER int64_t
#define TYPE float64
#define CELL double
#include "products.h"

#define PRODUCTS(type)                                                                                                 \
    {SET(mix_few_##type), SET(mix_many_##type), SET(add_dots_##type)}
static const Products SET(products)[] = {PRODUCTS(float32), PRODUCTS(float64), PRODUCTS(bfloat16), PRODUCTS(int8)};

#undef JOIN_
#undef JOIN
#undef FUNCTION
#undef PRODUCTS
#undef SET
#undef VECTOR_BYTES
#undef PANEL_VECTORS
#undef TILE_ROWS
#undef FEW_ROWS
#undef DOT_ROWS
