// The interface between csrc/cpu/linear/linear.cpp and the code of each SIMD level.
//
// A packed weight is a sequence of panels of `panel` columns of x W^T. A panel holds, for each step along `in`, one
// 32-bit word for each of its columns: a float32, or two bfloat16 that are neighbours along `in`. What lies beyond the
// weight is zero. With swiglu the first half of a panel are columns of w1, the second half the same columns of w3.
#pragma once

#include "msdd_fast/linear.h"

namespace msdd_fast {

struct LinearJob {
    void* out;
    DType out_dtype;
    std::int64_t out_stride;
    Rows x;
    const float* packed;
    std::int64_t panel_words;  // of one panel
    Operand bias;
    std::int64_t in, width;  // of a row of x and of out
    bool swiglu;
};

struct LinearPart {
    std::int64_t row, rows, panel, panels;
};

using LinearTask = void (*)(const LinearJob& job, const LinearPart& part);

struct LinearLevel {
    LinearTask run = nullptr;
    std::int64_t panel = 0;  // columns
    bool pairs = false;
};

// Pairs are padded to the depth of a tile of AMX, so that one layout serves all levels that multiply them.
constexpr std::int64_t PAIRS_DEPTH = 32;

void linear_task_plain(const LinearJob&, const LinearPart&);
void linear_task_plain_bf16(const LinearJob&, const LinearPart&);
void linear_task_plain_amx(const LinearJob&, const LinearPart&);

#if defined(__x86_64__) && defined(__GNUC__)
#define MSDD_X86_LEVELS
void linear_task_avx2(const LinearJob&, const LinearPart&);
void linear_task_avx512(const LinearJob&, const LinearPart&);
void linear_task_avx512bf16(const LinearJob&, const LinearPart&);
void linear_task_amx(const LinearJob&, const LinearPart&);
bool linear_has_amx();
#endif

constexpr std::int64_t PANEL_PLAIN = 16, PANEL_AVX2 = 16, PANEL_AVX512 = 64;

}  // namespace msdd_fast
