// The interface between csrc/cpu/linear/linear.cpp and the code of each SIMD level.
//
// A packed weight is a sequence of panels of `panel` columns of x W^T. A panel holds, for each step along `in`, one
// 32-bit word for each of its columns: a float32, or two bfloat16 or four int8 that are neighbours along `in`. What
// lies beyond the weight is zero. With swiglu the first half of a panel are columns of w1, the second half the same
// columns of w3. A panel of int8 ends with a float32 and an int32 for each column: its scale, and QUANTIZED_ZERO times
// the sum of its numbers.
#pragma once

#include <string>

#include "msdd_fast/detail/levels.h"
#include "msdd_fast/linear.h"
#include "msdd_fast/linear_int8.h"

namespace msdd_fast {

struct LinearJob {
    void* out;
    DType out_dtype;
    std::int64_t out_stride;
    Rows x;                   // of int8 products: `values.data` points at their bytes
    const float* row_scales;  // of int8 products
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
    std::int64_t panel = 0;     // columns
    std::int64_t per_word = 1;  // elements along `in`
};

// Words of pairs and of quads are padded to the depth of a tile of AMX, so that one layout serves all levels that
// multiply them.
constexpr std::int64_t TILE_WORDS = 16;

constexpr std::int64_t GRAIN_PRODUCTS = 500'000;  // multiplications worth a thread: about 5 us

inline std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// How a weight lies in panels.
struct LinearLayout {
    std::int64_t panels, words;  // words of a panel, without the scales of int8
};

LinearLayout layout_of(const LinearShape& shape, const LinearLevel& level);

// Row of the weight that is column `column` of panel `panel`, or -1.
std::int64_t row_of(const LinearShape& shape, std::int64_t panel_columns, std::int64_t panel, std::int64_t column);

// Throws std::invalid_argument on negative sizes and on an odd `out` with swiglu.
void expect_shape(const LinearShape& shape);

// The product of `rows` rows, in tasks for several threads. `row_bytes`: of a row of x as the tiles read it.
void run_linear(const LinearJob& job, const LinearLevel& level, std::int64_t rows, const LinearShape& shape,
                std::int64_t row_bytes, int threads);

// What another op needs to run tasks itself: the code for a weight, and how it is packed.
struct LinearPlan {
    LinearTask run;
    std::int64_t panel;   // columns
    std::int64_t panels;  // of the weight
    std::int64_t words;   // 32-bit words of a panel
};

// Throws std::invalid_argument as `linear` does.
LinearPlan linear_plan(const LinearShape& shape, DType dtype, const std::string& level);

void linear_task_plain(const LinearJob&, const LinearPart&);
void linear_task_plain_bf16(const LinearJob&, const LinearPart&);
void linear_task_plain_amx(const LinearJob&, const LinearPart&);
void linear_task_plain_int8(const LinearJob&, const LinearPart&);
void linear_task_plain_amx_int8(const LinearJob&, const LinearPart&);

#ifdef MSDD_X86_LEVELS
void linear_task_avx2(const LinearJob&, const LinearPart&);
void linear_task_avx512(const LinearJob&, const LinearPart&);
void linear_task_avx512bf16(const LinearJob&, const LinearPart&);
void linear_task_amx(const LinearJob&, const LinearPart&);
void linear_task_avx512vnni(const LinearJob&, const LinearPart&);
void linear_task_amx_int8(const LinearJob&, const LinearPart&);
#endif

constexpr std::int64_t PANEL_PLAIN = 16, PANEL_AVX2 = 16, PANEL_AVX512 = 64;

}  // namespace msdd_fast
