// Steps of products of bfloat16 by AVX-512: vdpbf16ps multiplies and adds a pair in every lane. After avx512.h.
#include <cstring>

#include "msdd_fast/dtype.h"

namespace msdd_fast {
namespace {

using Element = BFloat16;
constexpr std::int64_t STEP = 2;

MSDD_SIMD inline Vec broadcast(const BFloat16* from) {
    std::int32_t pair;
    std::memcpy(&pair, from, sizeof pair);
    return _mm512_castsi512_ps(_mm512_set1_epi32(pair));
}

MSDD_SIMD inline Vec broadcast_last(const BFloat16* from) { return _mm512_castsi512_ps(_mm512_set1_epi32(from->bits)); }

MSDD_SIMD inline Vec multiply_add(Vec a, Vec b, Vec c) {
    return _mm512_dpbf16_ps(c, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
}

}  // namespace
}  // namespace msdd_fast
