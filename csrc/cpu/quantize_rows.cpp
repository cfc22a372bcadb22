#include <algorithm>

#include "msdd_fast/check.h"
#include "msdd_fast/detail/floats.h"
#include "msdd_fast/detail/parallel.h"
#include "msdd_fast/detail/simd.h"
#include "msdd_fast/linear_int8.h"

namespace msdd_fast {
namespace {

constexpr std::int64_t QUANTIZE_CHUNK = 2048;  // elements widened at a time
constexpr std::int64_t QUANTIZE_GRAIN_ELEMENTS = 1 << 15;
constexpr int QUANTIZE_LANES = 32;

struct QuantizeRows {
    std::uint8_t* values;
    std::int64_t stride;
    float* scales;
    Rows x;
    std::int64_t width;
};

// The largest magnitude, NaN if there is one: as integers, magnitudes are in the same order and NaN is above them all.
MSDD_INLINE std::int32_t largest(const float* x, std::int64_t count, std::int32_t most) {
    std::int32_t lanes[QUANTIZE_LANES] = {};
    const std::int64_t whole = count - count % QUANTIZE_LANES;
    for (std::int64_t i = 0; i < whole; i += QUANTIZE_LANES)
        for (int j = 0; j < QUANTIZE_LANES; ++j) lanes[j] = std::max(lanes[j], detail::as_int(x[i + j]) & 0x7FFFFFFF);
    for (std::int64_t i = whole; i < count; ++i) most = std::max(most, detail::as_int(x[i]) & 0x7FFFFFFF);
    for (std::int32_t lane : lanes) most = std::max(most, lane);
    return most;
}

}  // namespace

MSDD_SIMD_CLONES void quantize_rows_part(const QuantizeRows& job, std::int64_t begin, std::int64_t end) {
    alignas(64) float wide[QUANTIZE_CHUNK];
    constexpr float TINY = 1e-12f;        // of an amax: a row of zeros divides by it
    constexpr float ROUND = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, in the last bits
    for (std::int64_t row = begin; row < end; ++row) {
        const std::int64_t from = row * job.x.stride;
        std::uint8_t* const to = job.values + row * job.stride;
        std::int32_t most = detail::as_int(TINY);
        for (std::int64_t at = 0; at < job.width; at += QUANTIZE_CHUNK) {
            const std::int64_t count = std::min(QUANTIZE_CHUNK, job.width - at);
            most = largest(floats(job.x.values, from + at, count, wide), count, most);
        }
        const float amax = detail::as_float(most);
        job.scales[row] = amax / QUANTIZED_LEVELS;
        const float inverse = QUANTIZED_LEVELS / amax;
        for (std::int64_t at = 0; at < job.width; at += QUANTIZE_CHUNK) {
            const std::int64_t count = std::min(QUANTIZE_CHUNK, job.width - at);
            const float* x = floats(job.x.values, from + at, count, wide);
            for (std::int64_t i = 0; i < count; ++i)
                to[at + i] = static_cast<std::uint8_t>(detail::as_int(x[i] * inverse + ROUND) + QUANTIZED_ZERO);
        }
        for (std::int64_t i = job.width; i < job.stride; ++i) to[i] = QUANTIZED_ZERO;
    }
}

void quantize_rows(std::uint8_t* values, std::int64_t stride, float* scales, const Rows& x, std::int64_t rows,
                   std::int64_t width, int threads) {
    expect(rows >= 0 && width >= 0, "sizes must not be negative");
    expect(stride >= width, "rows of values must not overlap");
    expect_threads(threads);
    if (rows == 0) return;
    const QuantizeRows job{values, stride, scales, x, width};
    parallel_for(rows, std::max<std::int64_t>(1, QUANTIZE_GRAIN_ELEMENTS / std::max<std::int64_t>(width, 1)), threads,
                 [&](std::int64_t begin, std::int64_t end) { quantize_rows_part(job, begin, end); });
}

}  // namespace msdd_fast
