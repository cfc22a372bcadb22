#include "msdd_fast/linear_int8.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "job.h"
#include "msdd_fast/check.h"
#include "msdd_fast/detail/floats.h"
#include "msdd_fast/detail/parallel.h"

namespace msdd_fast {
namespace {

constexpr std::int64_t MAX_IN = 1 << 16;
constexpr std::int64_t PER_WORD = 4;

LinearLevel find_level(const std::string& level) {
    if (level == "plain") return {linear_task_plain_int8, PANEL_AVX512, PER_WORD};
    if (level == "plain_amx") return {linear_task_plain_amx_int8, PANEL_AVX512, PER_WORD};
#ifdef MSDD_X86_LEVELS
    if (level == "avx512vnni" && can_run(level)) return {linear_task_avx512vnni, PANEL_AVX512, PER_WORD};
    if (level == "amx" && can_run(level)) return {linear_task_amx_int8, PANEL_AVX512, PER_WORD};
#endif
    return {};
}

LinearLevel level_of(const std::string& level) {
    static const LinearLevel best = find_level(linear_int8_level());
    if (level.empty()) return best;
    const LinearLevel found = find_level(level);
    expect(found.run != nullptr,
           "level must be plain, plain_amx, avx512vnni or amx and run on this machine, got " + level);
    return found;
}

// Of a packed panel: its numbers, then its columns' scales, then their offsets.
std::int64_t panel_words(const LinearLayout& layout, const LinearLevel& level) {
    return layout.words + 2 * level.panel;
}

LinearLayout layout_of_int8(const LinearShape& shape, const LinearLevel& level) {
    expect_shape(shape);
    expect(shape.in <= MAX_IN, "in must be at most " + std::to_string(MAX_IN) + ", got " + std::to_string(shape.in));
    return layout_of(shape, level);
}

}  // namespace

std::string linear_int8_level() {
    for (const char* level : {"amx", "avx512vnni"})
        if (can_run(level)) return level;
    return "plain";
}

std::int64_t linear_int8_packed_words(const LinearShape& shape, const std::string& level) {
    const LinearLevel found = level_of(level);
    const LinearLayout layout = layout_of_int8(shape, found);
    return layout.panels * panel_words(layout, found);
}

void linear_int8_pack(void* packed, const Operand& weight, std::int64_t stride, const LinearShape& shape,
                      const std::string& level, int threads) {
    expect_threads(threads);
    const LinearLevel found = level_of(level);
    const LinearLayout layout = layout_of_int8(shape, found);
    const std::int64_t words = panel_words(layout, found);
    parallel_for(layout.panels, 1, threads, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t panel = begin; panel < end; ++panel) {
            float* const to = static_cast<float*>(packed) + panel * words;
            std::memset(to, 0, static_cast<std::size_t>(words) * sizeof(float));
            auto* const quads = reinterpret_cast<std::int8_t*>(to);
            float* const scales = to + layout.words;
            for (std::int64_t column = 0; column < found.panel; ++column) {
                const std::int64_t row = row_of(shape, found.panel, panel, column);
                if (row < 0) continue;
                float amax = 1e-12f;  // of a column of zeros
                for (std::int64_t k = 0; k < shape.in; ++k) {
                    const float magnitude = std::fabs(element(weight, row * stride + k));
                    if (!(magnitude <= amax)) amax = magnitude;
                    if (std::isnan(amax)) break;
                }
                std::int32_t sum = 0;
                for (std::int64_t k = 0; k < shape.in && std::isfinite(amax); ++k) {
                    const float multiple = element(weight, row * stride + k) * (QUANTIZED_LEVELS / amax);
                    const auto rounded = static_cast<std::int8_t>(std::nearbyint(multiple));
                    quads[(k / PER_WORD * found.panel + column) * PER_WORD + k % PER_WORD] = rounded;
                    sum += rounded;
                }
                scales[column] = amax / QUANTIZED_LEVELS;
                const std::int32_t offset = QUANTIZED_ZERO * sum;
                std::memcpy(scales + found.panel + column, &offset, sizeof offset);
            }
        }
    });
}

void linear_int8(void* out, DType out_dtype, std::int64_t out_stride, const QuantizedRows& x, std::int64_t rows,
                 const void* packed, const Operand& bias, const LinearShape& shape, const std::string& level,
                 int threads) {
    expect(rows >= 0, "sizes must not be negative");
    expect_threads(threads);
    const LinearLevel found = level_of(level);
    const LinearLayout layout = layout_of_int8(shape, found);
    if (rows == 0 || layout.panels == 0) return;
    const std::int64_t depth = ceil_div(shape.in, QUANTIZED_DEPTH) * QUANTIZED_DEPTH;
    const std::int64_t width = shape.swiglu ? shape.out / 2 : shape.out;
    const LinearJob job{out,
                        out_dtype,
                        out_stride,
                        {{x.values, DType::float32}, x.stride},
                        x.scales,
                        static_cast<const float*>(packed),
                        panel_words(layout, found),
                        bias,
                        depth,
                        width,
                        shape.swiglu};
    run_linear(job, found, rows, shape, depth, threads);
}

}  // namespace msdd_fast
