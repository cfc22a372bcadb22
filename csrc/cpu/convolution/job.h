// The interface between csrc/cpu/convolution/convolution.cpp and the code of each SIMD level.
#pragma once

#include "msdd_fast/convolution.h"
#include "msdd_fast/detail/group_statistics.h"
#include "msdd_fast/detail/levels.h"

namespace msdd_fast {

struct ConvolutionJob {
    void* out;
    DType dtype;
    JoinedMaps maps;
    const float* packed;
    Operand bias;
    ConvolutionShape shape;
    ConvolutionNorm norm;
    const GroupNorm* norms;  // of image and group; null without
    ConvolutionSum sum;
    std::int64_t panels, panel_words;
    std::int64_t padded, sum_padded;  // channels of a pixel as the tiles read it
};

// Some lines of an image: of the result, or for `up` of the maps, each of which makes two.
struct ConvolutionPart {
    std::int64_t image, begin, end;
};

using ConvolutionTask = void (*)(const ConvolutionJob& job, const ConvolutionPart& part);

struct ConvolutionLevel {
    ConvolutionTask run = nullptr;
    std::int64_t panel = 0, per_word = 1;
};

void convolution_task_plain(const ConvolutionJob&, const ConvolutionPart&);
void convolution_task_plain_bf16(const ConvolutionJob&, const ConvolutionPart&);

#ifdef MSDD_X86_LEVELS
void convolution_task_avx2(const ConvolutionJob&, const ConvolutionPart&);
void convolution_task_avx512(const ConvolutionJob&, const ConvolutionPart&);
void convolution_task_avx512bf16(const ConvolutionJob&, const ConvolutionPart&);
#endif

// Narrow panels of many rows: maps have 32, 64 or 96 channels and thousands of pixels.
constexpr std::int64_t CONVOLUTION_PANEL = 16, CONVOLUTION_PANEL_AVX512 = 32;

}  // namespace msdd_fast
