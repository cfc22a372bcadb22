// Counter-based normals in C++ and CUDA: the same integers as msdd_fast/diffusion/noise.py bit for bit, and the same
// formulas for the normals (docs/spec.md#noise). A test compares every constant below with noise.py.
//
// Everything works on arrays of N lanes, structure of arrays: on a CPU the compiler vectorises each loop,
// and in a CUDA thread N = 1.
#pragma once

#include <cstdint>

#include "msdd_fast/detail/bits.h"

namespace msdd_fast {

constexpr std::uint32_t PURPOSE_START = 0;
constexpr std::uint32_t PURPOSE_RENOISE = 1;

constexpr int PHILOX_ROUNDS = 10;
constexpr std::uint32_t PHILOX_M0 = 0xD2511F53, PHILOX_M1 = 0xCD9E8D57;
constexpr std::uint32_t PHILOX_W0 = 0x9E3779B9, PHILOX_W1 = 0xBB67AE85;

constexpr std::int32_t SQRT_HALF_BITS = 0x3F3504F3;
constexpr float LN2 = 0.6931471805599453;

namespace detail {

MSDD_HD MSDD_INLINE float square_root(float x) {
#ifdef __CUDA_ARCH__
    return __fsqrt_rn(x);
#else
    return __builtin_sqrtf(x);
#endif
}

// Upper half of a 64-bit product. The lower half is computed apart, as a 32-bit product: AVX2 has an instruction for
// each half, but taking both from one 64-bit product is a third slower.
MSDD_HD MSDD_INLINE std::uint32_t high_product(std::uint32_t a, std::uint32_t b) {
    return static_cast<std::uint32_t>((static_cast<std::uint64_t>(a) * b) >> 32);
}

// ln(m) = f + f^2 * P(f), f = m - 1.
MSDD_HD MSDD_INLINE float ln_poly(float f) {
    constexpr float LN_POLY[] = {-0.49999983098949363, 0.3333393328718552,  -0.25002583729967925, 0.19963477140538022,
                                 -0.16551787268271428, 0.14883682213628957, -0.14426883417863098, 0.08979535850837832};
    float sum = LN_POLY[7];
    for (int i = 6; i >= 0; --i) sum = sum * f + LN_POLY[i];
    return sum;
}

// sin(pi/4 f) = f * S(f^2).
MSDD_HD MSDD_INLINE float sin_poly(float f2) {
    constexpr float SIN_POLY[] = {0.7853981609834083, -0.08074543483025413, 0.00249000712714321,
                                  -3.595450778985987e-05};
    float sum = SIN_POLY[3];
    for (int i = 2; i >= 0; --i) sum = sum * f2 + SIN_POLY[i];
    return sum;
}

// cos(pi/4 f) = C(f^2).
MSDD_HD MSDD_INLINE float cos_poly(float f2) {
    constexpr float COS_POLY[] = {0.9999999999526005, -0.30842513516184394, 0.015854325246207668,
                                  -0.0003259386143583289, 3.52981134114212e-06};
    float sum = COS_POLY[4];
    for (int i = 3; i >= 0; --i) sum = sum * f2 + COS_POLY[i];
    return sum;
}

}  // namespace detail

// Philox4x32-10 in place: `counter` holds four words of N lanes, the two key words are common to all lanes.
template <int N>
MSDD_HD MSDD_INLINE void philox(std::uint32_t (&counter)[4][N], std::uint32_t k0, std::uint32_t k1) {
    for (int round = 0; round < PHILOX_ROUNDS; ++round) {
        for (int i = 0; i < N; ++i) {
            const std::uint32_t c0 = counter[0][i], c2 = counter[2][i];
            counter[0][i] = detail::high_product(PHILOX_M1, c2) ^ counter[1][i] ^ k0;
            counter[1][i] = PHILOX_M1 * c2;
            counter[2][i] = detail::high_product(PHILOX_M0, c0) ^ counter[3][i] ^ k1;
            counter[3][i] = PHILOX_M0 * c0;
        }
        k0 += PHILOX_W0;
        k1 += PHILOX_W1;
    }
}

// Two 32-bit words to two independent normals; see noise.box_muller for the use of each bit.
MSDD_HD MSDD_INLINE void box_muller(std::uint32_t radius_word, std::uint32_t angle_word, float& n0, float& n1) {
    // Conversions go through int32, which every SIMD level converts in one instruction; the values fit in 25 bits.
    const float u = static_cast<float>(static_cast<std::int32_t>(radius_word >> 8) + 1) * 0x1p-24f;
    const std::int32_t bits = detail::as_int(u) - SQRT_HALF_BITS;
    const float exponent = static_cast<float>(bits >> 23);
    const float m = detail::as_float((bits & 0x7FFFFF) + SQRT_HALF_BITS) - 1.0f;
    const float ln_u = exponent * LN2 + (m + m * m * detail::ln_poly(m));
    const float radius = detail::square_root(-2.0f * ln_u);

    const float f = static_cast<float>(static_cast<std::int32_t>((angle_word >> 6) & 0x7FFFFF) * 2 + 1) * 0x1p-24f;
    const std::int32_t sin = detail::as_int(f * detail::sin_poly(f * f));
    const std::int32_t cos = detail::as_int(detail::cos_poly(f * f));
    // Bit 31 swaps the two (as a mask, so that no lane branches), bits 30 and 29 are their signs.
    const std::int32_t differ = (sin ^ cos) & (static_cast<std::int32_t>(angle_word) >> 31);
    const std::int32_t sign0 = static_cast<std::int32_t>((angle_word << 1) & 0x80000000u);
    const std::int32_t sign1 = static_cast<std::int32_t>((angle_word << 2) & 0x80000000u);
    n0 = radius * detail::as_float(cos ^ differ ^ sign0);
    n1 = radius * detail::as_float(sin ^ differ ^ sign1);
}

// The four normals (top left, top right, bottom left, bottom right) of N consecutive 2x2 blocks of one image.
template <int N>
MSDD_HD MSDD_INLINE void block_normals(float (&eps)[4][N], std::uint64_t seed, std::uint32_t first_block,
                                       std::uint32_t stage, std::uint32_t purpose) {
    std::uint32_t words[4][N];
    for (int i = 0; i < N; ++i) {
        words[0][i] = first_block + static_cast<std::uint32_t>(i);
        words[1][i] = stage;
        words[2][i] = 0;
        words[3][i] = purpose;
    }
    philox<N>(words, static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32));
    for (int i = 0; i < N; ++i) {
        box_muller(words[0][i], words[1][i], eps[0][i], eps[1][i]);
        box_muller(words[2][i], words[3][i], eps[2][i], eps[3][i]);
    }
}

// Unit normals to unit normals correlated inside each block: a * (eps - mean) + b * mean, with
// a = sqrt(1 - rho) and b = sqrt(1 + 3 rho).
template <int N>
MSDD_HD MSDD_INLINE void correlate_blocks(float (&eps)[4][N], float a, float b) {
    for (int i = 0; i < N; ++i) {
        const float mean = (eps[0][i] + eps[1][i] + eps[2][i] + eps[3][i]) * 0.25f;
        const float shift = b * mean;
        for (int k = 0; k < 4; ++k) eps[k][i] = a * (eps[k][i] - mean) + shift;
    }
}

}  // namespace msdd_fast
