// 3 x 3 convolutions of channels-last maps on the CPU, with the norm before them and the sum behind them within.
#pragma once

#include <cstdint>
#include <string>

#include "msdd_fast/group_norm_modulate_silu.h"
#include "msdd_fast/operand.h"

namespace msdd_fast {

// same: padding 1. down: stride 2, padding 1. up: nearest x 2, then as same.
enum class ConvolutionKind : int { same = 0, down = 1, up = 2 };

// Up to two maps (batch, height, width, channels), dense, joined along their channels.
struct JoinedMaps {
    const void* data[2] = {nullptr, nullptr};
    std::int64_t channels[2] = {0, 0};

    std::int64_t all() const { return channels[0] + channels[1]; }
};

struct ConvolutionShape {
    ConvolutionKind kind;
    std::int64_t batch, height, width;  // of the maps that go in
    std::int64_t out;                   // channels
};

// What is done to the maps before: GroupNorm, unless `groups` is 0, affine, modulation, SiLU, as in
// group_norm_modulate_silu.h.
struct ConvolutionNorm {
    std::int64_t groups = 0, rows = 1, columns = 1;
    float eps = 0.0f;
    bool silu = false;
    Operand weight, bias;
    Cells scale, shift;
};

// What is added to the result: maps of its height and width. With `shortcut` their 1 x 1 convolution, whose weight lies
// in `packed` behind the other; without, one map of its channels.
struct ConvolutionSum {
    JoinedMaps maps;
    bool shortcut = false;
};

// How a weight is packed: columns of a panel, elements of a 32-bit word, and whether they are bfloat16.
//
// A weight is a matrix (out, k). k runs through the taps by row and column and in each of them through the channels,
// of which there are made an even number by a zero where words are pairs; then, with a shortcut, through its channels,
// as even. Its rows, in panels with zeros at the end, lie as (panel, word of k, column): as `linear_pack` has them. An
// `up` has four matrices, for even and odd lines, and in each for even and odd columns, of 2 x 2 taps whose weights are
// sums of the 3 x 3 ones.
struct ConvolutionLayout {
    std::int64_t panel, per_word;
    DType dtype;
};

// Levels as in linear.h; "amx" multiplies as "avx512bf16", and "plain_amx" as "plain_bf16".
ConvolutionLayout convolution_layout(DType dtype, const std::string& level);

// out = convolution(norm(maps)) + bias + sum, of `dtype` as all maps; bias of any. Summed in float32, one rounding;
// normalised maps are rounded to bfloat16 where words are pairs. Bits depend neither on the number of threads nor on
// other images. `out` must not overlap what goes in; `packed` is aligned to 64 bytes.
// Throws std::invalid_argument for sizes that do not fit together, threads < 1 or a level that cannot run here.
void convolution(void* out, DType dtype, const JoinedMaps& maps, const void* packed, const Operand& bias,
                 const ConvolutionShape& shape, const ConvolutionNorm& norm, const ConvolutionSum& sum,
                 const std::string& level, int threads);

}  // namespace msdd_fast
