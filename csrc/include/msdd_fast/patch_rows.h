// Types shared by the ops at the end of a stage. Patch rows are (N, B, C*p*p): N = g*g tokens in row-major order,
// B images, features in (c, py, px) order.
//
// E = x + dt * v, or x + dt * (v_uncond + scale * (v - v_uncond)) if v_uncond is given. float32 inside, rounded once.
#pragma once

#include <cstdint>

#include "msdd_fast/dtype.h"

namespace msdd_fast {

// The last dimension is contiguous. Strides are in elements.
struct PatchRows {
    const void* data = nullptr;  // null where the operand is absent
    DType dtype = DType::float32;
    std::int64_t token_stride = 0, image_stride = 0;
};

struct PatchShape {
    std::int64_t grid;  // tokens in a row and in a column
    std::int64_t batch, channels, patch;
};

struct EulerScalars {
    float dt, scale;
};

}  // namespace msdd_fast
