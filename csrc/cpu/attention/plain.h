// Vectors for any machine, as wide as those of AVX-512.
#include <cstring>

#include "msdd_fast/detail/bits.h"

#define MSDD_SIMD

namespace msdd_fast {
namespace {

constexpr int LANES = 16, ROWS = 8;

struct Vec {
    float lane[LANES];
};

template <class Function>
inline Vec each(const Function& function) {
    Vec result;
    for (int i = 0; i < LANES; ++i) result.lane[i] = function(i);
    return result;
}

inline Vec load(const float* from) {
    Vec result;
    std::memcpy(&result, from, sizeof result);
    return result;
}

inline void store(float* to, const Vec& a) { std::memcpy(to, &a, sizeof a); }

inline Vec set(float value) {
    return each([&](int) { return value; });
}

// Product and sum, rounded twice.
inline Vec fma(const Vec& a, const Vec& b, const Vec& c) {
    return each([&](int i) { return a.lane[i] * b.lane[i] + c.lane[i]; });
}

inline Vec add(const Vec& a, const Vec& b) {
    return each([&](int i) { return a.lane[i] + b.lane[i]; });
}

inline Vec sub(const Vec& a, const Vec& b) {
    return each([&](int i) { return a.lane[i] - b.lane[i]; });
}

inline Vec mul(const Vec& a, const Vec& b) {
    return each([&](int i) { return a.lane[i] * b.lane[i]; });
}

// b where one of them is NaN, as the instruction of x86.
inline Vec max(const Vec& a, const Vec& b) {
    return each([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
}

// a * 2^n, n in the lowest bits of b.
inline Vec scale_by_power(const Vec& a, const Vec& b) {
    return each([&](int i) {
        const auto shifted = static_cast<std::uint32_t>(detail::as_int(b.lane[i])) << 23;
        return detail::as_float(
            static_cast<std::int32_t>(static_cast<std::uint32_t>(detail::as_int(a.lane[i])) + shifted));
    });
}

inline float reduce_max(const Vec& a) {
    float result = a.lane[0];
    for (int i = 1; i < LANES; ++i) result = result > a.lane[i] ? result : a.lane[i];
    return result;
}

inline float reduce_add(const Vec& a) {
    float result = 0;
    for (int i = 0; i < LANES; ++i) result += a.lane[i];
    return result;
}

inline void transpose_8x8(const float* from, std::int64_t from_stride, float* to, std::int64_t to_stride) {
    for (int i = 0; i < 8; ++i)
        for (int j = 0; j < 8; ++j) to[j * to_stride + i] = from[i * from_stride + j];
}

}  // namespace
}  // namespace msdd_fast
