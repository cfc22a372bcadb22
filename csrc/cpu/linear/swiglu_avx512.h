// Vectors of AVX-512 for swiglu_vectors.h.
#include "job.h"
#include "msdd_fast/detail/intrinsics.h"

namespace msdd_fast {
namespace {

using Floats = __m512;
constexpr std::int64_t FLOATS = 16, SWIGLU_PANEL = PANEL_AVX512;

MSDD_SIMD inline Floats load_floats(const float* from) { return _mm512_loadu_ps(from); }
MSDD_SIMD inline void store_floats(float* to, Floats a) { _mm512_storeu_ps(to, a); }
MSDD_SIMD inline Floats set_floats(float value) { return _mm512_set1_ps(value); }
MSDD_SIMD inline Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
MSDD_SIMD inline Floats sub(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
MSDD_SIMD inline Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
MSDD_SIMD inline Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
MSDD_SIMD inline Floats fnma(Floats a, Floats b, Floats c) { return _mm512_fnmadd_ps(a, b, c); }
MSDD_SIMD inline Floats min(Floats a, Floats b) { return _mm512_min_ps(a, b); }
MSDD_SIMD inline Floats max(Floats a, Floats b) { return _mm512_max_ps(a, b); }

MSDD_SIMD inline Floats round_floats(Floats a) {
    return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

MSDD_SIMD inline Floats times_power_of_two(Floats a, Floats n) { return _mm512_scalef_ps(a, n); }

MSDD_SIMD inline Floats where_at_most(Floats a, Floats b, Floats value) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a, b, _CMP_LE_OQ), value);
}

// An estimate of 14 bits and one step of Newton's.
MSDD_SIMD inline Floats reciprocal(Floats a) {
    const Floats estimate = _mm512_rcp14_ps(a);
    return fma(estimate, fnma(a, estimate, set_floats(1.0f)), estimate);
}

}  // namespace
}  // namespace msdd_fast

#include "swiglu_vectors.h"
