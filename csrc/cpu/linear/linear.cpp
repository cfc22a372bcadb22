#include "msdd_fast/linear.h"

#include <algorithm>
#include <cstring>

#include "job.h"
#include "msdd_fast/check.h"
#include "msdd_fast/detail/floats.h"
#include "msdd_fast/detail/parallel.h"

namespace msdd_fast {
namespace {

constexpr std::int64_t BLOCK_BYTES = 256 * 1024;     // rows of x that stay in L2 while panels pass
constexpr std::int64_t MIN_ROWS = 6, MAX_ROWS = 96;  // of a task
constexpr std::int64_t TASKS_PER_THREAD = 8;         // enough that the last tasks do not leave a thread idle for long

// Code for this level and dtype; none if the machine cannot run it.
LinearLevel find_level(const std::string& level, DType dtype) {
    const bool pairs = dtype == DType::bfloat16;
    if (pairs && level == "plain_bf16") return {linear_task_plain_bf16, PANEL_AVX512, 2};
    if (pairs && level == "plain_amx") return {linear_task_plain_amx, PANEL_AVX512, 2};
    if (level == "plain" || level == "plain_bf16" || level == "plain_amx") return {linear_task_plain, PANEL_PLAIN};
#ifdef MSDD_X86_LEVELS
    if (!can_run(level)) return {};
    if (level == "avx2") return {linear_task_avx2, PANEL_AVX2};
    if (pairs && level == "avx512bf16") return {linear_task_avx512bf16, PANEL_AVX512, 2};
    if (pairs && level == "amx") return {linear_task_amx, PANEL_AVX512, 2};
    return {linear_task_avx512, PANEL_AVX512};
#else
    return {};
#endif
}

LinearLevel level_of(const std::string& level, DType dtype) {
    static const LinearLevel best[] = {find_level(linear_level(), DType::float32),
                                       find_level(linear_level(), DType::bfloat16),
                                       find_level(linear_level(), DType::float16)};
    if (level.empty()) return best[static_cast<int>(dtype)];
    const LinearLevel found = find_level(level, dtype);
    expect(found.run != nullptr,
           "level must be plain, plain_bf16, plain_amx, avx2, avx512, avx512bf16 or amx and run on this machine, got " +
               level);
    return found;
}

// Rows of a task: few enough for L2, and such that the threads finish together.
std::int64_t rows_per_task(std::int64_t rows, std::int64_t panels, std::int64_t row_bytes, int threads) {
    const std::int64_t fit = std::max<std::int64_t>(row_bytes, 1);
    const std::int64_t most = std::min(MAX_ROWS, std::max(MIN_ROWS, BLOCK_BYTES / fit / MIN_ROWS * MIN_ROWS));
    std::int64_t blocks = ceil_div(rows, most);
    const auto uneven = [&] {
        const std::int64_t tasks = blocks * panels;
        return tasks % threads != 0 && tasks < TASKS_PER_THREAD * threads;
    };
    while (threads > 1 && uneven() && rows / (blocks + 1) >= MIN_ROWS) ++blocks;
    return ceil_div(rows, blocks);
}

}  // namespace

void expect_shape(const LinearShape& shape) {
    expect(shape.out >= 0 && shape.in >= 0, "sizes must not be negative");
    expect(!shape.swiglu || shape.out % 2 == 0, "out must be even with swiglu, got " + std::to_string(shape.out));
}

LinearLayout layout_of(const LinearShape& shape, const LinearLevel& level) {
    const std::int64_t width = shape.swiglu ? shape.out / 2 : shape.out, columns = level.panel / (shape.swiglu ? 2 : 1);
    const std::int64_t words = ceil_div(shape.in, level.per_word);
    const std::int64_t steps = level.per_word == 1 ? words : ceil_div(words, TILE_WORDS) * TILE_WORDS;
    return {ceil_div(width, columns), steps * level.panel};
}

std::int64_t row_of(const LinearShape& shape, std::int64_t panel_columns, std::int64_t panel, std::int64_t column) {
    if (!shape.swiglu) {
        const std::int64_t row = panel * panel_columns + column;
        return row < shape.out ? row : -1;
    }
    const std::int64_t half = panel_columns / 2, width = shape.out / 2, row = panel * half + column % half;
    return row < width ? row + column / half * width : -1;
}

void run_linear(const LinearJob& job, const LinearLevel& level, std::int64_t rows, const LinearShape& shape,
                std::int64_t row_bytes, int threads) {
    const std::int64_t panels = layout_of(shape, level).panels, products = rows * shape.out * shape.in;
    threads = threads_for(products, GRAIN_PRODUCTS, threads);
    const std::int64_t step = rows_per_task(rows, panels, row_bytes, threads), tasks = ceil_div(rows, step) * panels;
    if (threads == 1) {
        for (std::int64_t row = 0; row < rows; row += step)
            level.run(job, {row, std::min(step, rows - row), 0, panels});
        return;
    }
    share_tasks(tasks, threads, [&](std::int64_t, std::int64_t task) {
        const std::int64_t row = task / panels * step;
        level.run(job, {row, std::min(step, rows - row), task % panels, 1});
    });
}

std::string linear_level() {
    for (const char* level : {"amx", "avx512bf16", "avx512", "avx2"})
        if (can_run(level)) return level;
    return "plain";
}

LinearPlan linear_plan(const LinearShape& shape, DType dtype, const std::string& level) {
    expect_shape(shape);
    const LinearLevel found = level_of(level, dtype);
    const auto [panels, words] = layout_of(shape, found);
    return {found.run, found.panel, panels, words};
}

PackedSize linear_packed_size(const LinearShape& shape, DType dtype, const std::string& level) {
    expect_shape(shape);
    const LinearLevel found = level_of(level, dtype);
    const auto [panels, words] = layout_of(shape, found);
    return {panels * words * found.per_word, found.per_word == 2 ? DType::bfloat16 : DType::float32};
}

void linear_pack(void* packed, const Operand& weight, std::int64_t stride, const LinearShape& shape,
                 const std::string& level, int threads) {
    expect_shape(shape);
    expect_threads(threads);
    const LinearLevel found = level_of(level, weight.dtype);
    const auto [panels, words] = layout_of(shape, found);
    const std::int64_t per_panel = words;
    if (per_panel == 0) return;  // and `packed` may be null
    parallel_for(panels, 1, threads, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t panel = begin; panel < end; ++panel) {
            float* const to = static_cast<float*>(packed) + panel * per_panel;
            std::memset(to, 0, static_cast<std::size_t>(per_panel) * sizeof(float));
            for (std::int64_t column = 0; column < found.panel; ++column) {
                const std::int64_t row = row_of(shape, found.panel, panel, column);
                if (row < 0) continue;
                if (found.per_word == 2) {
                    const BFloat16* const from = static_cast<const BFloat16*>(weight.data) + row * stride;
                    auto* const pairs = reinterpret_cast<BFloat16*>(to);
                    for (std::int64_t k = 0; k < shape.in; ++k)
                        pairs[(k / 2 * found.panel + column) * 2 + k % 2] = from[k];
                } else {
                    for (std::int64_t k = 0; k < shape.in; ++k)
                        to[k * found.panel + column] = element(weight, row * stride + k);
                }
            }
        }
    });
}

void linear(void* out, DType out_dtype, std::int64_t out_stride, const Rows& x, std::int64_t rows, const void* packed,
            const Operand& bias, const LinearShape& shape, const std::string& level, int threads) {
    expect_shape(shape);
    expect(rows >= 0, "sizes must not be negative");
    expect_threads(threads);
    const LinearLevel found = level_of(level, x.values.dtype);
    const auto [panels, words] = layout_of(shape, found);
    if (rows == 0 || panels == 0) return;
    const std::int64_t width = shape.swiglu ? shape.out / 2 : shape.out;
    const LinearJob job{out,   out_dtype, out_stride, x,     nullptr,     static_cast<const float*>(packed),
                        words, bias,      shape.in,   width, shape.swiglu};
    run_linear(job, found, rows, shape, shape.in * (found.per_word == 2 ? 2 : 4), threads);
}

}  // namespace msdd_fast
