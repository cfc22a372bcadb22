// The activation of the SwiGLU MLP on the CPU (docs/spec.md#swiglu).
#pragma once

#include <cstdint>

#include "msdd_fast/operand.h"

namespace msdd_fast {

// out = a / (1 + e^-a) * b: `rows` x `width`, the rows of a and b `stride_a` and `stride_b` elements apart, out
// contiguous; all of `dtype`, float32 inside, rounded once. Throws std::invalid_argument on negative sizes or
// threads < 1.
void swiglu(void* out, const void* a, const void* b, DType dtype, std::int64_t rows, std::int64_t width,
            std::int64_t stride_a, std::int64_t stride_b, int threads);

}  // namespace msdd_fast
