// SwiGLU of a row of sums by AVX-512.
#include "msdd_fast/detail/intrinsics.h"

#define MSDD_SWIGLU

namespace msdd_fast {
namespace {

// a x + b.
MSDD_SIMD inline __m512 line(float a, __m512 x, float b) {
    return _mm512_fmadd_ps(_mm512_set1_ps(a), x, _mm512_set1_ps(b));
}

// 2^y to 1.1e-7 relative for y in [-126, 126]: 2^n 2^r with |r| <= 1/2, 2^r by a polynomial (minimax, 1 at 0).
MSDD_SIMD inline __m512 exp2_bounded(__m512 y) {
    const __m512 n = _mm512_roundscale_ps(y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 r = _mm512_sub_ps(y, n), r2 = _mm512_mul_ps(r, r);
    const __m512 high = _mm512_fmadd_ps(line(0.001326472731307149f, r, 0.009671512991189957f), r2,
                                        line(0.05550733581185341f, r, 0.24022242426872253f));
    return _mm512_scalef_ps(_mm512_fmadd_ps(high, r2, line(0.6931470036506653f, r, 1.0f)), n);
}

// silu(a) * b = a * b / (1 + e^-a) to 3e-7 relative; where e^-a exceeds 2^126, which is where the result is next to
// nothing, as if it were that. The reciprocal is an estimate of 14 bits and one step of Newton's.
MSDD_SIMD inline __m512 swiglu_of(__m512 a, __m512 b) {
    const __m512 limit = _mm512_set1_ps(126.0f), one = _mm512_set1_ps(1.0f);
    const __m512 power = _mm512_mul_ps(a, _mm512_set1_ps(-1.4426950408889634f));
    const __m512 y = _mm512_max_ps(_mm512_min_ps(power, limit), _mm512_sub_ps(_mm512_setzero_ps(), limit));
    const __m512 d = _mm512_add_ps(one, exp2_bounded(y)), estimate = _mm512_rcp14_ps(d);
    const __m512 inverse = _mm512_fmadd_ps(estimate, _mm512_fnmadd_ps(d, estimate, one), estimate);
    return _mm512_mul_ps(_mm512_mul_ps(a, inverse), b);
}

// The first half of a row becomes silu(first half) * second half; `bias` of both is added before, if there is one.
MSDD_SIMD inline void swiglu_sums(float* sums, const float* bias) {
    constexpr std::int64_t half = PANEL_AVX512 / 2;
#pragma GCC unroll 2
    for (std::int64_t i = 0; i < half; i += 16) {
        __m512 a = _mm512_loadu_ps(sums + i), b = _mm512_loadu_ps(sums + half + i);
        if (bias != nullptr) {
            a = _mm512_add_ps(a, _mm512_loadu_ps(bias + i));
            b = _mm512_add_ps(b, _mm512_loadu_ps(bias + half + i));
        }
        _mm512_storeu_ps(sums + i, swiglu_of(a, b));
    }
}

}  // namespace
}  // namespace msdd_fast
