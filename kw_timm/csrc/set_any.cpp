/* What every processor has. */
#include "instruction_set.h"

namespace {
struct Any {
    static constexpr int VECTOR_BYTES = 16, PANEL_VECTORS = 3, TILE_ROWS = 4, FEW_ROWS = 6, DOT_ROWS = 4;
};
}

constexpr kw_timm::InstructionSet kw_timm::any_set = instruction_set<Any>();
