// Vectors of AVX2 and steps of products of float32. MSDD_SIMD is the level's attribute.
#include "msdd_fast/detail/intrinsics.h"

namespace msdd_fast {
namespace {

using Element = float;
using Vec = __m256;
constexpr int LANES = 8;
constexpr std::int64_t STEP = 1;

MSDD_SIMD inline Vec load(const float* from) { return _mm256_loadu_ps(from); }
MSDD_SIMD inline void store(float* to, Vec a) { _mm256_storeu_ps(to, a); }
MSDD_SIMD inline Vec zero() { return _mm256_setzero_ps(); }
MSDD_SIMD inline Vec broadcast(const float* from) { return _mm256_set1_ps(*from); }
MSDD_SIMD inline Vec broadcast_last(const float* from) { return broadcast(from); }
MSDD_SIMD inline Vec multiply_add(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }

}  // namespace
}  // namespace msdd_fast
