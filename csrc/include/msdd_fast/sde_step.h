// A step of a sampler that estimates the image and adds new noise, on the CPU.
#pragma once

#include <cstdint>

#include "msdd_fast/operand.h"

namespace msdd_fast {

struct SdeShape {
    std::int64_t batch, channels, height, width;
    std::int64_t patch;  // of v: 0 for an image, else pixels of tokens (tokens, batch, patch * patch, channels)
};

struct SdeOptions {
    float t, t_next;
    std::int64_t stage;
    bool renoise, clamp;
};

// x0 = x - t * v, in float64, then rounded to float32; out = (1 - t_next) * x0 + t_next * noise with `renoise`, else
// x0; limited to [-1, 1] with `clamp`. noise is given, or the white normals of `seeds` and `stage`
// (docs/spec.md#noise). x, out and noise (batch, channels, height, width), contiguous, out of x's dtype.
// Throws std::invalid_argument on negative sizes, a patch that does not divide height and width, odd height or width
// with seeds, a stage outside [0, 2^32), threads < 1 or a missing operand.
void sde_step(void* out, const Operand& x, const Operand& v, const Operand& noise, const std::int64_t* seeds,
              const SdeShape& shape, const SdeOptions& options, int threads);

}  // namespace msdd_fast
