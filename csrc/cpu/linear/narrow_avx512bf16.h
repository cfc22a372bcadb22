// Rounding of the levels that have the instructions of AVX-512 for bfloat16.
#include "msdd_fast/detail/intrinsics.h"
#include "msdd_fast/dtype.h"

#define MSDD_NARROW

namespace msdd_fast {
namespace {

// As `narrow`, but that results below the smallest normal number become zero, as they do in the products.
MSDD_SIMD inline void narrow_sums(const float* values, std::int64_t count, BFloat16* out) {
    for (std::int64_t i = 0; i < count; i += 16) {
        const auto keep = static_cast<__mmask16>(count - i >= 16 ? 0xFFFF : (1 << (count - i)) - 1);
        const __m256bh rounded = _mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(keep, values + i));
        _mm256_mask_storeu_epi16(out + i, keep, reinterpret_cast<__m256i>(rounded));
    }
}

}  // namespace
}  // namespace msdd_fast
