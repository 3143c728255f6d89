/* AVX-512: mixing.cpp looks whether the processor has it. */
#include "tasks.h"
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512bw,avx512dq,avx512vl,avx512cd,bmi2"))), apply_to = function)
#else
#pragma GCC target("avx512bw,avx512dq,avx512vl,avx512cd,bmi2")
#endif
#include "instruction_set.h"

namespace {
struct Avx512 {
    static constexpr int VECTOR_BYTES = 64, PANEL_VECTORS = 3, TILE_ROWS = 8, FEW_ROWS = 12, DOT_ROWS = 4;
};
}

constexpr kw_timm::InstructionSet kw_timm::avx512_set = instruction_set<Avx512>();
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
