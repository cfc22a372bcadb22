// Statistics of LayerNorm in two passes: the mean, then the mean square about it.
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

// `count` must be at least 1. The tail after whole groups of LANES is summed sequentially.
template <int LANES>
MSDD_INLINE Squares centred_squares(const float* x, std::int64_t count) {
    const std::int64_t whole = count - count % LANES;
    float lanes[LANES] = {}, rest = 0.0f;
    for (std::int64_t i = 0; i < whole; i += LANES)
        for (int j = 0; j < LANES; ++j) lanes[j] += x[i + j];
    for (std::int64_t i = whole; i < count; ++i) rest += x[i];
    const float mean = (detail::add_up(lanes) + rest) / static_cast<float>(count);

    float squares[LANES] = {}, more = 0.0f;
    for (std::int64_t i = 0; i < whole; i += LANES)
        for (int j = 0; j < LANES; ++j) squares[j] += (x[i + j] - mean) * (x[i + j] - mean);
    for (std::int64_t i = whole; i < count; ++i) more += (x[i] - mean) * (x[i] - mean);
    return {mean, detail::add_up(squares) + more};
}

template <int LANES>
MSDD_INLINE Moments moments(const float* x, std::int64_t count, float eps) {
    const auto [mean, sum] = centred_squares<LANES>(x, count);
    return {mean, 1.0f / std::sqrt(sum / static_cast<float>(count) + eps)};
}

}  // namespace msdd_fast
