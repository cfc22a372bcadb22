// Upsampling and renoising on the CPU, with the normals of msdd_fast/diffusion/noise.py
// (docs/spec.md#renoise, docs/spec.md#noise).
//
// Results are bitwise independent of the number of threads, the batch and the memory order.
#pragma once

#include <cstdint>

#include "msdd_fast/dtype.h"

namespace msdd_fast {

struct RenoiseScalars {
    float alpha, beta;
    std::int64_t stage;
    double correlation;
};

// out = alpha * nearest_x2(x) + beta * n, n of unit variance with `correlation` inside 2x2 blocks, from the streams of
// `seeds` and `stage`. x is (batch, channels, height, width), out twice as high and wide; both of `dtype`, dense, in
// NHWC memory order if `channels_last`, else NCHW. float32 inside, rounded once.
// Throws std::invalid_argument on negative sizes, threads < 1, more than 2^32 blocks of 2x2 in an image, or when the
// stage or the correlation is out of range.
void renoise_upsample(void* out, const void* x, DType dtype, bool channels_last, const std::int64_t* seeds,
                      std::int64_t batch, std::int64_t channels, std::int64_t height, std::int64_t width,
                      const RenoiseScalars& scalars, int threads);

}  // namespace msdd_fast
