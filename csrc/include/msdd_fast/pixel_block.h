// The two halves of a pixel block on the CPU: every pixel is normed and modulated by numbers that a linear layer makes
// from its token's features. The modulation lives in cache, a tile at a time.
#pragma once

#include <cstdint>
#include <string>

#include "msdd_fast/operand.h"

namespace msdd_fast {

constexpr std::int64_t MAX_PIXEL_CHANNELS = 64, MAX_PIXEL_HIDDEN = 4 * MAX_PIXEL_CHANNELS;

struct PixelShape {
    std::int64_t tokens, pixels, channels;  // pixels of a token; channels a multiple of 4 up to MAX_PIXEL_CHANNELS
    std::int64_t in;                        // features of a token
    float eps;
};

// The layer that makes the modulation: rows of features, and its weight as linear_pack packs one of (pixels * parts *
// channels, in), without swiglu, for `level`.
struct PixelModulation {
    Rows features;
    const void* packed;
    Operand bias;  // (pixels * parts * channels,)
    std::string level;
};

// Weights (hidden, channels) and (channels, hidden), contiguous, hidden up to MAX_PIXEL_HIDDEN.
struct PixelMlp {
    Operand fc1_weight, fc1_bias, fc2_weight, fc2_bias;
    std::int64_t hidden;
};

// out = rms_weight * x / sqrt(mean square + eps) * (1 + scale) + shift over the channels of every pixel; a pixel's two
// parts of the modulation are shift, scale. x and out (tokens, pixels, channels), contiguous.
//
// float32 inside, rounded once. Bits of a token depend neither on the other tokens nor on the number of threads.
// Throws std::invalid_argument on sizes out of range, threads < 1, a missing operand or a level that cannot run here.
void pixel_modulate(void* out, DType out_dtype, const Operand& x, const PixelModulation& modulation,
                    const Operand& rms_weight, const PixelShape& shape, int threads);

// x1 = x + gate1 * y; out = x1 + gate2 * fc2(gelu(fc1(rms_weight * x1 / sqrt(mean square + eps) * (1 + scale2) +
// shift2))); a pixel's four parts of the modulation are gate1, shift2, scale2, gate2. x, y and out (tokens, pixels,
// channels), contiguous, out of x's dtype. The rest as above.
void pixel_block(void* out, const Operand& x, const Operand& y, const PixelModulation& modulation,
                 const Operand& rms_weight, const PixelMlp& mlp, const PixelShape& shape, int threads);

}  // namespace msdd_fast
