// Vectors of AVX2 for swiglu_vectors.h.
#include "job.h"
#include "msdd_fast/detail/intrinsics.h"

namespace msdd_fast {
namespace {

using Floats = __m256;
constexpr std::int64_t FLOATS = 8, SWIGLU_PANEL = PANEL_AVX2;

MSDD_SIMD inline Floats load_floats(const float* from) { return _mm256_loadu_ps(from); }
MSDD_SIMD inline void store_floats(float* to, Floats a) { _mm256_storeu_ps(to, a); }
MSDD_SIMD inline Floats set_floats(float value) { return _mm256_set1_ps(value); }
MSDD_SIMD inline Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
MSDD_SIMD inline Floats sub(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
MSDD_SIMD inline Floats mul(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
MSDD_SIMD inline Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
MSDD_SIMD inline Floats fnma(Floats a, Floats b, Floats c) { return _mm256_fnmadd_ps(a, b, c); }
MSDD_SIMD inline Floats min(Floats a, Floats b) { return _mm256_min_ps(a, b); }
MSDD_SIMD inline Floats max(Floats a, Floats b) { return _mm256_max_ps(a, b); }

MSDD_SIMD inline Floats round_floats(Floats a) {
    return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

MSDD_SIMD inline Floats times_power_of_two(Floats a, Floats n) {
    const __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a), exponent));
}

MSDD_SIMD inline Floats where_at_most(Floats a, Floats b, Floats value) {
    return _mm256_and_ps(value, _mm256_cmp_ps(a, b, _CMP_LE_OQ));
}

// An estimate of 12 bits and two steps of Newton's.
MSDD_SIMD inline Floats reciprocal(Floats a) {
    Floats estimate = _mm256_rcp_ps(a);
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) estimate = fma(estimate, fnma(a, estimate, set_floats(1.0f)), estimate);
    return estimate;
}

}  // namespace
}  // namespace msdd_fast

#include "swiglu_vectors.h"
