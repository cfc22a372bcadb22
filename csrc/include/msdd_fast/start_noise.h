// White noise on the CPU, equal to that of msdd_fast/diffusion/noise.py (docs/spec.md#noise).
//
// Results are bitwise independent of the number of threads, the batch and the layout.
#pragma once

#include <cstdint>

#include "msdd_fast/dtype.h"

namespace msdd_fast {

// White unit normals into `out`, contiguous (batch, channels, height, width) of `dtype`, one seed per image.
// Throws std::invalid_argument on odd or negative sizes, threads < 1, or more than 2^32 blocks of 2x2 in an image.
void start_noise(void* out, DType dtype, const std::int64_t* seeds, std::int64_t batch, std::int64_t channels,
                 std::int64_t height, std::int64_t width, int threads);

// The numbers of start_noise as patch rows of patches `patch` wide, an even divisor of height and width.
void start_noise_rows(void* out, DType dtype, const std::int64_t* seeds, std::int64_t batch, std::int64_t channels,
                      std::int64_t height, std::int64_t width, std::int64_t patch, int threads);

}  // namespace msdd_fast
