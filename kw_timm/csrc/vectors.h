/* Vectors of one instruction set, for one type of cells. */
#pragma once
#include "tasks.h"

#define ALWAYS_INLINE inline __attribute__((always_inline))
#define PREFETCH(address) __builtin_prefetch(address, 0, 2)
#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

namespace kw_timm {

struct Bfloat16 {
    uint16_t bits;
};

/* Call `of` with the value, which is one of 1 to MOST, as a constant; with MOST if it is more. */
template <int MOST, typename Function> ALWAYS_INLINE void with_constant(ptrdiff_t value, Function of)
{
    if constexpr (MOST > 1)
        if (value < MOST)
            return with_constant<MOST - 1>(value, of);
    of(std::integral_constant<int, MOST>{});
}

/* Set is a type that no other file knows: code for different sets must not be taken for the same. */
template <typename Set, typename Cell> struct Vectors {
    using Real = std::conditional_t<std::is_same_v<Cell, double>, double, float>; /* coefficients, sums, results */
    using Integer = std::conditional_t<std::is_same_v<Cell, double>, int64_t, int32_t>; /* as large as Real */
    static constexpr int LANES = Set::VECTOR_BYTES / sizeof(Real);
    typedef Real Vector __attribute__((vector_size(Set::VECTOR_BYTES)));
    typedef Integer Integers __attribute__((vector_size(Set::VECTOR_BYTES)));
    typedef uint16_t Halves __attribute__((vector_size(LANES * 2)));
    typedef int8_t Bytes __attribute__((vector_size(LANES)));

    static ALWAYS_INLINE Vector broadcast(Real value) { return value - Vector{}; /* + would turn -0 into 0 */ }

    template <typename As, typename From> static ALWAYS_INLINE As read(const From *from)
    {
        As value;
        memcpy(&value, from, sizeof value);
        return value;
    }

    static ALWAYS_INLINE Vector load(const Real *from) { return read<Vector>(from); }
    static ALWAYS_INLINE Vector load(const int8_t *from)
    {
#if defined(WITH_AVX2)
        if constexpr (Set::VECTOR_BYTES == 32) { /* GCC would convert eight bytes one after another. */
            typedef char Bytes16 __attribute__((vector_size(16)));
            typedef int64_t Half __attribute__((vector_size(16)));
            const Half bytes = {read<int64_t>(from), 0};
            return __builtin_convertvector((Integers)__builtin_ia32_pmovsxbd256((Bytes16)bytes), Vector);
        }
#endif
        /* At once, GCC would convert one element after another. */
        return __builtin_convertvector(__builtin_convertvector(read<Bytes>(from), Integers), Vector);
    }
    static ALWAYS_INLINE Vector load(const Bfloat16 *from)
    {
        return (Vector)(__builtin_convertvector(read<Halves>(from), Integers) << 16);
    }
    static ALWAYS_INLINE void store(Real *to, Vector value) { memcpy(to, &value, sizeof value); }

    template <typename Value> static ALWAYS_INLINE Real widen(Value value) { return value; }
    static ALWAYS_INLINE Real widen(Bfloat16 value)
    {
        const uint32_t bits = (uint32_t)value.bits << 16;
        return read<float>(&bits);
    }

    /* Sums of lanes that lie D apart, those of `a` first. */
    template <int D, int... LANE>
    static ALWAYS_INLINE Vector add_neighbours(Vector a, Vector b, std::integer_sequence<int, LANE...>)
    {
#if defined(__clang__)
        return __builtin_shufflevector(a, b, (LANE & D ? LANE - D + LANES : LANE)...) +
               __builtin_shufflevector(a, b, (LANE & D ? LANE + LANES : LANE + D)...);
#else
        return __builtin_shuffle(a, b, Integers{(LANE & D ? LANE - D + LANES : LANE)...}) +
               __builtin_shuffle(a, b, Integers{(LANE & D ? LANE + LANES : LANE + D)...});
#endif
    }

    /* Add up the lanes of each of COUNT vectors, two vectors' into one. */
    template <int COUNT, int D = 1> static ALWAYS_INLINE void add_lanes(Real *sums, const Vector *vectors)
    {
        if constexpr (D == LANES)
            UNROLL for (int i = 0; i < COUNT; i++)
                store(sums + i * LANES, vectors[i]);
        else {
            Vector halved[COUNT / 2];
            UNROLL for (int i = 0; i < COUNT / 2; i++)
                halved[i] = add_neighbours<D>(vectors[2 * i], vectors[2 * i + 1],
                                              std::make_integer_sequence<int, LANES>{});
            add_lanes<COUNT / 2, 2 * D>(sums, halved);
        }
    }
};

}
