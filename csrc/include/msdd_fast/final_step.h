// The last Euler step on patch rows, on the CPU: to the pixels of an image.
#pragma once

#include "msdd_fast/detail/pixels.h"
#include "msdd_fast/patch_rows.h"

namespace msdd_fast {

// E as an image (batch, channels, grid * patch, grid * patch), in NHWC memory order if `channels_last`, else NCHW.
void final_step(void* out, PixelType type, bool channels_last, const PatchRows& x, const PatchRows& v,
                const PatchRows& v_uncond, const PatchShape& shape, const EulerScalars& euler, int threads);

}  // namespace msdd_fast
