// GroupNorm, affine, modulation at a lower resolution and SiLU on the CPU (docs/spec.md#ssdd-network).
#pragma once

#include <cstdint>

#include "msdd_fast/detail/group_statistics.h"
#include "msdd_fast/operand.h"

namespace msdd_fast {

// (batch, channels, rows, columns) in any memory order: strides in elements.
struct Cells {
    Operand values;
    std::int64_t image = 0, channel = 0, row = 0, column = 0;
};

struct GroupNormShape {
    std::int64_t batch, channels, height, width, groups;
    std::int64_t rows, columns;  // of scale and shift; they divide height and width
    bool channels_last;          // memory order of x and out
    bool silu;
    float eps;
};

// out = f((x - mean) / sqrt(variance + eps) * weight + bias) with f(y) = silu(y * (1 + scale) + shift), mean and
// variance of a group of channels of one image; a pixel (y, x) takes row y * rows / height of scale and shift, and the
// column likewise. x and out of `dtype`, weight and bias `channels` elements. Absent weight, scale: ones and zeros;
// absent bias, shift: zeros. float32 inside, rounded once. Results are bitwise independent of the number of
// threads and of other images.
// Throws std::invalid_argument on sizes that do not divide, more than MAX_NORM_CHANNELS channels or threads < 1.
void group_norm_modulate_silu(void* out, const void* x, DType dtype, const Operand& weight, const Operand& bias,
                              const Cells& scale, const Cells& shift, const GroupNormShape& shape, int threads);

}  // namespace msdd_fast
