// The ops at the end of a stage on patch rows (N, B, C*p*p): N = g*g tokens row by row, B images, features in
// (c, py, px) order.
//
// E = x + dt * v, or x + dt * (v_uncond + scale * (v - v_uncond)) if v_uncond is given. float32 inside, rounded once.
#pragma once

#include <cstdint>

#include "msdd_fast/dtype.h"
#include "msdd_fast/noise.h"

namespace msdd_fast {

// Patch rows of which every row is contiguous. Strides count elements.
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

// Elements of the final image; uint8 is clamp(127.5 E + 128, 0, 255) without its fraction, and 0 for NaN.
enum class PixelType : int { float32 = 0, bfloat16 = 1, float16 = 2, uint8 = 3 };

// out = alpha * nearest_x2(E) + beta * n as renoise_upsample makes it of the image, as contiguous patch rows of twice
// the grid, of the dtype of x. Throws std::invalid_argument on an odd patch or as renoise_upsample does.
void stage_transition(void* out, const PatchRows& x, const PatchRows& v, const PatchRows& v_uncond,
                      const PatchShape& shape, const EulerScalars& euler, const std::int64_t* seeds,
                      const RenoiseScalars& renoise, int threads);

// E as an image (batch, channels, grid * patch, grid * patch), in NHWC memory order if `channels_last`, else NCHW.
void final_step(void* out, PixelType type, bool channels_last, const PatchRows& x, const PatchRows& v,
                const PatchRows& v_uncond, const PatchShape& shape, const EulerScalars& euler, int threads);

// The numbers of start_noise as patch rows of patches `patch` wide, an even divisor of height and width.
void start_noise_rows(void* out, DType dtype, const std::int64_t* seeds, std::int64_t batch, std::int64_t channels,
                      std::int64_t height, std::int64_t width, std::int64_t patch, int threads);

}  // namespace msdd_fast
