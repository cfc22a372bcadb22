// Vectors of AVX-512: 8 x 32 sums in 16 of the 32 registers. MSDD_SIMD is the level's attribute.
#include "x86.h"

namespace msdd_fast {
namespace {

using Vec = __m512;
constexpr int LANES = 16, ROWS = 8;

MSDD_SIMD inline Vec load(const float* from) { return _mm512_loadu_ps(from); }
MSDD_SIMD inline void store(float* to, Vec a) { _mm512_storeu_ps(to, a); }
MSDD_SIMD inline Vec set(float value) { return _mm512_set1_ps(value); }
MSDD_SIMD inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
MSDD_SIMD inline Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
MSDD_SIMD inline Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
MSDD_SIMD inline Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
MSDD_SIMD inline Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }

MSDD_SIMD inline Vec scale_by_power(Vec a, Vec b) {
    const __m512i shifted = _mm512_slli_epi32(_mm512_castps_si512(b), 23);
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(a), shifted));
}

MSDD_SIMD inline float reduce_max(Vec a) { return _mm512_reduce_max_ps(a); }
MSDD_SIMD inline float reduce_add(Vec a) { return _mm512_reduce_add_ps(a); }

}  // namespace
}  // namespace msdd_fast
