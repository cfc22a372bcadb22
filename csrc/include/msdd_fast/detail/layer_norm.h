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
#include <cstring>

#include "msdd_fast/detail/bits.h"

namespace msdd_fast {
namespace detail {

#if defined(__GNUC__)
using Four = float __attribute__((vector_size(16)));
#else
struct Four {
    float lane[4];
    float operator[](int i) const { return lane[i]; }
    void operator+=(const Four& other) {
        for (int i = 0; i < 4; ++i) lane[i] += other.lane[i];
    }
};
#endif

// COUNT fours into the first, by recursion: a loop over the widths is not unrolled, and then every step goes through
// memory. In fours, or the compiler takes a vector apart into single lanes.
template <int COUNT>
MSDD_INLINE void add_fours(Four* fours) {
    if constexpr (COUNT > 1) {
        for (int i = 0; i < COUNT / 2; ++i) fours[i] += fours[i + COUNT / 2];
        add_fours<COUNT / 2>(fours);
    }
}

template <int LANES>
MSDD_INLINE float add_up(const float (&lanes)[LANES]) {
    Four fours[LANES / 4];
    std::memcpy(fours, lanes, sizeof lanes);
    add_fours<LANES / 4>(fours);
    return (fours[0][0] + fours[0][2]) + (fours[0][1] + fours[0][3]);
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
