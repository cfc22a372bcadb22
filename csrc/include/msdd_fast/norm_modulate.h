// LayerNorm or RMSNorm and adaLN modulation on the CPU, optionally preceded by a gated residual (docs/spec.md#adaln).
#pragma once

#include <cstdint>

#include "msdd_fast/operand.h"

namespace msdd_fast {

constexpr std::int64_t MAX_NORM_WIDTH = 8192;  // a row's buffers lie on the stack

using Table = Rows;

struct NormShape {
    std::int64_t rows, width;
    std::int64_t run, groups;  // row r uses row min(r / run, groups - 1) of the tables
    float eps;
};

// x_new = x + gate * y, rounded to `dtype`, or x if y is absent (then x_new and gate are not touched);
// h = (x_new - mean) / sqrt(variance + eps) * (1 + scale) + shift over the last dimension. x, x_new, h: `rows` x
// `width`, contiguous, of `dtype`; y likewise, of any. float32 inside, each result rounded once. Nothing may overlap.
// With `rms_weight`, a table too, h = rms_weight * x_new / sqrt(mean square + eps) * (1 + scale) + shift instead.
// Throws std::invalid_argument on negative sizes, width above MAX_NORM_WIDTH, run or groups < 1, threads < 1, or a
// missing table.
void norm_modulate(void* h, void* x_new, const void* x, DType dtype, const Operand& y, const Table& gate,
                   const Table& shift, const Table& scale, const Table& rms_weight, const NormShape& shape,
                   int threads);

}  // namespace msdd_fast
