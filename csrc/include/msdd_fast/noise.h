// The noise ops on the CPU: normals equal to those of msdd_fast/diffusion/noise.py (DESIGN section 7), never stored.
//
// Neither the number of threads, nor the split into batches, nor the memory order changes a bit of a value.
#pragma once

#include <cstdint>

#include "msdd_fast/dtype.h"

namespace msdd_fast {

// White unit normals into `out`, contiguous (batch, channels, height, width) of `dtype`, one seed per image.
// Throws std::invalid_argument on odd or negative sizes, threads < 1, or more than 2^32 blocks of 2x2 in an image.
void start_noise(void* out, DType dtype, const std::int64_t* seeds, std::int64_t batch, std::int64_t channels,
                 std::int64_t height, std::int64_t width, int threads);

struct RenoiseScalars {
    float alpha, beta;
    std::int64_t stage;
    double correlation;
};

// out = alpha * nearest_x2(x) + beta * n, n of unit variance with `correlation` inside 2x2 blocks, from the streams of
// `seeds` and `stage`. x is (batch, channels, height, width), out twice as high and wide; both of `dtype`, dense, in
// NHWC memory order if `channels_last`, else NCHW. float32 inside, rounded once.
// Throws also when the stage or the correlation is out of range.
void renoise_upsample(void* out, const void* x, DType dtype, bool channels_last, const std::int64_t* seeds,
                      std::int64_t batch, std::int64_t channels, std::int64_t height, std::int64_t width,
                      const RenoiseScalars& scalars, int threads);

}  // namespace msdd_fast
