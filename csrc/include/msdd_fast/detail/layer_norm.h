// Statistics of LayerNorm in two passes: the mean, then the mean square about it.
//
// The mean of a sum in float32 may be some units in the last place off. Where the row hardly varies, that is as much as
// its deviation, and rstd makes it large: there the mean is corrected by that of the centred values, which is small and
// therefore exact, and the squares are summed again. Other rows keep their bits and their two passes.
//
// Sums run in LANES independent lanes that are added up as a tree: vectors of any width do that in the same order, so
// the bits do not depend on the SIMD level, and no -ffast-math is needed.
#pragma once

#include <cmath>
#include <cstdint>

#include "msdd_fast/detail/bits.h"

namespace msdd_fast {
namespace detail {

template <int LANES>
MSDD_INLINE float add_up(float (&lanes)[LANES]) {
    for (int width = LANES / 2; width > 0; width /= 2)
        for (int j = 0; j < width; ++j) lanes[j] += lanes[j + width];
    return lanes[0];
}

}  // namespace detail

struct Squares {
    float mean, sum;  // sum: of the squares about the mean
};

struct Moments {
    float mean, rstd;  // rstd: 1 / sqrt(variance + eps)
};

// Whether `sum` of the squares about the mean is so small that the mean's own rounding matters: a standard deviation
// of less than a thousandth of the mean.
MSDD_INLINE bool nearly_constant(float mean, float sum, std::int64_t count) {
    return sum < static_cast<float>(count) * (mean * 0x1p-10f) * (mean * 0x1p-10f);
}

namespace detail {

// Mean of x - `centre`. The tail after whole groups of LANES is summed sequentially.
template <int LANES>
MSDD_INLINE float mean_about(const float* x, std::int64_t count, float centre) {
    const std::int64_t whole = count - count % LANES;
    float lanes[LANES] = {}, rest = 0.0f;
    for (std::int64_t i = 0; i < whole; i += LANES)
        for (int j = 0; j < LANES; ++j) lanes[j] += x[i + j] - centre;
    for (std::int64_t i = whole; i < count; ++i) rest += x[i] - centre;
    return (add_up(lanes) + rest) / static_cast<float>(count);
}

// Sum of the squares of x - `centre`.
template <int LANES>
MSDD_INLINE float squares_about(const float* x, std::int64_t count, float centre) {
    const std::int64_t whole = count - count % LANES;
    float lanes[LANES] = {}, rest = 0.0f;
    for (std::int64_t i = 0; i < whole; i += LANES)
        for (int j = 0; j < LANES; ++j) lanes[j] += (x[i + j] - centre) * (x[i + j] - centre);
    for (std::int64_t i = whole; i < count; ++i) rest += (x[i] - centre) * (x[i] - centre);
    return add_up(lanes) + rest;
}

}  // namespace detail

// `count` must be at least 1.
template <int LANES>
MSDD_INLINE Squares centred_squares(const float* x, std::int64_t count) {
    float mean = detail::mean_about<LANES>(x, count, 0.0f);
    float sum = detail::squares_about<LANES>(x, count, mean);
    if (nearly_constant(mean, sum, count)) {
        mean += detail::mean_about<LANES>(x, count, mean);
        sum = detail::squares_about<LANES>(x, count, mean);
    }
    return {mean, sum};
}

template <int LANES>
MSDD_INLINE Moments moments(const float* x, std::int64_t count, float eps) {
    const auto [mean, sum] = centred_squares<LANES>(x, count);
    return {mean, 1.0f / std::sqrt(sum / static_cast<float>(count) + eps)};
}

// Of RMSNorm: 1 / sqrt(mean square + eps).
template <int LANES>
MSDD_INLINE float rms_factor(const float* x, std::int64_t count, float eps) {
    return 1.0f / std::sqrt(detail::squares_about<LANES>(x, count, 0.0f) / static_cast<float>(count) + eps);
}

}  // namespace msdd_fast
