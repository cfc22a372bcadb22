// The activation of a GEGLU feed-forward on the CPU (docs/spec.md#ssdd-network).
#pragma once

#include <cstdint>

#include "msdd_fast/operand.h"

namespace msdd_fast {

// out = value * gate (1 + erf(gate / sqrt(2))) / 2: `rows` x `width`, contiguous, of value's dtype, which is gate's
// too; float32 inside, rounded once. Throws std::invalid_argument on negative sizes, missing operands, two dtypes or
// threads < 1.
void geglu(void* out, const Rows& value, const Rows& gate, std::int64_t rows, std::int64_t width, int threads);

}  // namespace msdd_fast
