/*
 * All code for one instruction set. A set's file selects the instructions, for what follows, and then includes this:
 * the compiler decides how vectors are split where a function is defined, not where it is inlined.
 */
#pragma once
#include "attention.h"
#include "dots.h"
#include "mix.h"

namespace kw_timm {

template <typename Set, typename Cell> constexpr Products products_of()
{
    using Real = typename Vectors<Set, Cell>::Real;
    return {sizeof(Real), Mix<Set, Cell>::pack, Mix<Set, Cell>::mix, DotProducts<Set, Real>::add_dots,
            DotProducts<Set, Real>::add_up};
}

template <typename Set> constexpr InstructionSet instruction_set()
{
    return {Set::VECTOR_BYTES,
            {products_of<Set, float>(), products_of<Set, double>(), products_of<Set, Bfloat16>(),
             products_of<Set, int8_t>()},
            AttentionSteps<Set>::mean,
            AttentionSteps<Set>::hide,
            AttentionSteps<Set>::attend};
}

}
