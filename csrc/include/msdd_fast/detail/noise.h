// The arithmetic shared by all noise ops: LANES blocks of 2x2 pixels at a time, independent of the memory layout.
#pragma once

#include <cstdint>

#include "msdd_fast/dtype.h"
#include "msdd_fast/philox.h"
#include "msdd_fast/renoise_upsample.h"

namespace msdd_fast {

constexpr int LANES = 32;  // blocks at a time: enough independent vectors to hide the latency of Philox
constexpr std::int64_t GRAIN_BLOCKS = 1 << 12;  // about 0.05 ms of work with AVX2

struct NoiseFormula {
    std::uint32_t stage, purpose;
    float a, b;  // factors of correlate_blocks; a == b means white
    float alpha, beta;
};

constexpr NoiseFormula START_FORMULA{0, PURPOSE_START, 1.0f, 1.0f, 0.0f, 1.0f};

// The formula of renoising. Throws when the stage or the correlation is out of range.
NoiseFormula renoise_formula(const RenoiseScalars& scalars);

// alpha * pixel + beta * n for LANES blocks from `first_block` on, as an upper and a lower line. All lanes are always
// computed, even past the end of a line, so a value does not depend on the image width or the batch.
MSDD_INLINE void renoise_blocks(const float (&pixel)[LANES], std::uint64_t seed, std::uint32_t first_block,
                                const NoiseFormula& formula, float (&lines)[2][2 * LANES]) {
    float eps[4][LANES];
    block_normals<LANES>(eps, seed, first_block, formula.stage, formula.purpose);
    if (formula.a != formula.b) correlate_blocks<LANES>(eps, formula.a, formula.b);
    for (int i = 0; i < LANES; ++i) {
        const float base = formula.alpha * pixel[i];
        lines[0][2 * i] = base + formula.beta * eps[0][i];
        lines[0][2 * i + 1] = base + formula.beta * eps[1][i];
        lines[1][2 * i] = base + formula.beta * eps[2][i];
        lines[1][2 * i + 1] = base + formula.beta * eps[3][i];
    }
}

// Noise over an image, in csrc/cpu/renoise_upsample.cpp: `out` (batch, channels, 2 height, 2 width) from x (batch,
// channels, height, width), both dense in NHWC memory order if `channels_last`, else NCHW; x null: the noise alone.
void noise_image(void* out, const void* x, DType dtype, bool channels_last, const std::int64_t* seeds,
                 std::int64_t batch, std::int64_t channels, std::int64_t height, std::int64_t width,
                 const NoiseFormula& formula, int threads);

}  // namespace msdd_fast
