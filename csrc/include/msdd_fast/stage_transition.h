// The transition from one stage to the next on patch rows, on the CPU: Euler step, upsampling and renoising.
#pragma once

#include <cstdint>

#include "msdd_fast/patch_rows.h"
#include "msdd_fast/renoise_upsample.h"

namespace msdd_fast {

// out = alpha * nearest_x2(E) + beta * n as renoise_upsample makes it of the image, as contiguous patch rows of twice
// the grid, of the dtype of x. Throws std::invalid_argument on an odd patch or as renoise_upsample does.
void stage_transition(void* out, const PatchRows& x, const PatchRows& v, const PatchRows& v_uncond,
                      const PatchShape& shape, const EulerScalars& euler, const std::int64_t* seeds,
                      const RenoiseScalars& renoise, int threads);

}  // namespace msdd_fast
