#include "msdd_fast/convolution.h"

#include <algorithm>
#include <vector>

#include "job.h"
#include "msdd_fast/check.h"
#include "msdd_fast/detail/parallel.h"
#include "msdd_fast/linear.h"

namespace msdd_fast {
namespace {

constexpr std::int64_t GRAIN_PRODUCTS = 500'000;  // multiplications worth a thread: about 5 us
constexpr std::int64_t MIN_LINES = 8;             // of a part: it reads two more
constexpr std::int64_t PARTS_PER_THREAD = 4;

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

ConvolutionLevel find_level(const std::string& level, DType dtype) {
    const bool pairs = dtype == DType::bfloat16;
    if (pairs && (level == "plain_bf16" || level == "plain_amx"))
        return {convolution_task_plain_bf16, CONVOLUTION_PANEL_AVX512, 2};
    if (level == "plain" || level == "plain_bf16" || level == "plain_amx")
        return {convolution_task_plain, CONVOLUTION_PANEL};
#ifdef MSDD_X86_LEVELS
    if (!can_run(level)) return {};
    if (level == "avx2") return {convolution_task_avx2, CONVOLUTION_PANEL};
    if (pairs && (level == "avx512bf16" || level == "amx"))
        return {convolution_task_avx512bf16, CONVOLUTION_PANEL_AVX512, 2};
    return {convolution_task_avx512, CONVOLUTION_PANEL_AVX512};
#else
    return {};
#endif
}

ConvolutionLevel level_of(const std::string& level, DType dtype) {
    static const ConvolutionLevel best[] = {find_level(linear_level(), DType::float32),
                                            find_level(linear_level(), DType::bfloat16),
                                            find_level(linear_level(), DType::float16)};
    if (level.empty()) return best[static_cast<int>(dtype)];
    const ConvolutionLevel found = find_level(level, dtype);
    expect(found.run != nullptr,
           "level must be plain, plain_bf16, plain_amx, avx2, avx512, avx512bf16 or amx and run on this machine, got " +
               level);
    return found;
}

void expect_maps(const JoinedMaps& maps) {
    expect(maps.channels[0] >= 1 && maps.channels[1] >= 0, "maps must have channels");
    expect(maps.all() <= MAX_NORM_CHANNELS, "channels must be at most " + std::to_string(MAX_NORM_CHANNELS));
}

}  // namespace

ConvolutionLayout convolution_layout(DType dtype, const std::string& level) {
    const ConvolutionLevel found = level_of(level, dtype);
    return {found.panel, found.per_word, found.per_word == 2 ? DType::bfloat16 : DType::float32};
}

void convolution(void* out, DType dtype, const JoinedMaps& maps, const void* packed, const Operand& bias,
                 const ConvolutionShape& shape, const ConvolutionNorm& norm, const ConvolutionSum& sum,
                 const std::string& level, int threads) {
    const auto& [kind, batch, height, width, columns] = shape;
    expect(batch >= 0 && height >= 0 && width >= 0 && columns >= 0, "sizes must not be negative");
    expect_maps(maps);
    if (sum.shortcut) expect_maps(sum.maps);
    const bool down = kind == ConvolutionKind::down, up = kind == ConvolutionKind::up;
    expect(norm.groups >= 0 && (norm.groups == 0 || maps.all() % norm.groups == 0), "groups must divide channels");
    expect(norm.rows >= 1 && norm.columns >= 1 && height % norm.rows == 0 && width % norm.columns == 0,
           "rows and columns of scale and shift must divide height and width");
    expect(!sum.shortcut || kind == ConvolutionKind::same, "a shortcut goes with a convolution of one size");
    expect_threads(threads);
    const ConvolutionLevel found = level_of(level, dtype);
    if (batch == 0 || height == 0 || width == 0 || columns == 0) return;
    expect(out != nullptr && maps.data[0] != nullptr && packed != nullptr, "out, maps or packed is missing");

    std::vector<GroupNorm> norms(static_cast<std::size_t>(batch * norm.groups));
    if (norm.groups > 0) {
        const PixelMap joined[] = {{{maps.data[0], dtype}, maps.channels[0]},
                                   {{maps.data[1], dtype}, maps.channels[1]}};
        group_statistics(joined, maps.channels[1] > 0 ? 2 : 1, batch, height * width, norm.groups, norm.eps,
                         norms.data(), threads);
    }
    const auto even = [&](std::int64_t count) { return ceil_div(count, found.per_word) * found.per_word; };
    const std::int64_t padded = even(maps.all()), sum_padded = sum.shortcut ? even(sum.maps.all()) : 0;
    const std::int64_t words = ((up ? 4 : 9) * padded + sum_padded) / found.per_word;
    const ConvolutionJob job{out,
                             dtype,
                             maps,
                             static_cast<const float*>(packed),
                             bias,
                             shape,
                             norm,
                             norm.groups > 0 ? norms.data() : nullptr,
                             sum,
                             ceil_div(columns, found.panel),
                             words * found.panel,
                             padded,
                             sum_padded};
    const std::int64_t lines = down ? ceil_div(height, 2) : height;
    const std::int64_t products = batch * lines * width * columns * 9 * maps.all();
    threads = threads_for(products, GRAIN_PRODUCTS, threads);
    // Parts of an image: as few as keep all threads busy to the end, for each reads two lines that its neighbours read.
    const std::int64_t wanted = threads == 1 ? 1 : ceil_div(PARTS_PER_THREAD * threads, batch);
    const std::int64_t least = ceil_div(lines, MIN_LINES);
    const std::int64_t parts = std::max<std::int64_t>(1, std::min(wanted, std::max<std::int64_t>(least, 2)));
    share_tasks(batch * parts, threads, [&](std::int64_t, std::int64_t task) {
        const std::int64_t part = task % parts;
        found.run(job, {task / parts, lines * part / parts, lines * (part + 1) / parts});
    });
}

}  // namespace msdd_fast
