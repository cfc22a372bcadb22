// Steps of products of float32 by AVX-512. After avx512.h.

namespace msdd_fast {
namespace {

using Element = float;
constexpr std::int64_t STEP = 1;

MSDD_SIMD inline Vec broadcast(const float* from) { return _mm512_set1_ps(*from); }
MSDD_SIMD inline Vec broadcast_last(const float* from) { return broadcast(from); }
MSDD_SIMD inline Vec multiply_add(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }

}  // namespace
}  // namespace msdd_fast
