/* AVX2: mixing.cpp looks whether the processor has it. */
#include "tasks.h"
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,bmi2"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,bmi2")
#define WITH_AVX2 /* of GCC's functions for it, which tells no C++ file itself */
#endif
#include "instruction_set.h"

namespace {
struct Avx2 {
    static constexpr int VECTOR_BYTES = 32, PANEL_VECTORS = 3, TILE_ROWS = 4, FEW_ROWS = 6, DOT_ROWS = 2;
};
}

constexpr kw_timm::InstructionSet kw_timm::avx2_set = instruction_set<Avx2>();
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
