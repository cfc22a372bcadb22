// Noise tensors on the CPU, equal to msdd_fast.noise.start_noise and .renoise_noise (DESIGN section 7).
#pragma once

#include <cstdint>

namespace msdd_fast {

// Fills `out`, contiguous float32 (batch, channels, height, width), with white unit normals. `seeds` holds one
// seed per image. Neither the number of threads nor the split into batches changes a bit of the result.
// Throws std::invalid_argument on odd or negative sizes, threads < 1, or more than 2^32 blocks in an image.
void start_noise(float* out, const std::int64_t* seeds, std::int64_t batch, std::int64_t channels, std::int64_t height,
                 std::int64_t width, int threads);

// The same for the noise added at the start of `stage`: unit variance, `correlation` in [-1/3, 1) between the
// four pixels of a 2x2 block. Throws also when the stage or the correlation is out of range.
void renoise_noise(float* out, const std::int64_t* seeds, std::int64_t batch, std::int64_t channels,
                   std::int64_t height, std::int64_t width, std::int64_t stage, double correlation, int threads);

}  // namespace msdd_fast
