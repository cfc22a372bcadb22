// Vectors of AVX-512. MSDD_SIMD is the level's attribute.
#include <cstdint>

#include "msdd_fast/detail/intrinsics.h"

namespace msdd_fast {
namespace {

using Vec = __m512;
constexpr int LANES = 16;

MSDD_SIMD inline Vec load(const float* from) { return _mm512_loadu_ps(from); }
MSDD_SIMD inline void store(float* to, Vec a) { _mm512_storeu_ps(to, a); }
MSDD_SIMD inline Vec zero() { return _mm512_setzero_ps(); }

}  // namespace
}  // namespace msdd_fast
