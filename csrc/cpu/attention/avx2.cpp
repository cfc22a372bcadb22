// Attention by AVX2 and FMA: 6 x 16 sums in 12 of the 16 registers.
#include "job.h"

#ifdef MSDD_X86_LEVELS
#define MSDD_SIMD __attribute__((target("avx2,fma")))

#include "x86.h"

namespace msdd_fast {
namespace {

using Vec = __m256;
constexpr int LANES = 8, ROWS = 6;

MSDD_SIMD inline Vec load(const float* from) { return _mm256_loadu_ps(from); }
MSDD_SIMD inline void store(float* to, Vec a) { _mm256_storeu_ps(to, a); }
MSDD_SIMD inline Vec set(float value) { return _mm256_set1_ps(value); }
MSDD_SIMD inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
MSDD_SIMD inline Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
MSDD_SIMD inline Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
MSDD_SIMD inline Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
MSDD_SIMD inline Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }

MSDD_SIMD inline Vec scale_by_power(Vec a, Vec b) {
    const __m256i shifted = _mm256_slli_epi32(_mm256_castps_si256(b), 23);
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a), shifted));
}

MSDD_SIMD inline float reduce_max(Vec a) {
    __m128 half = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    half = _mm_max_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_max_ss(half, _mm_shuffle_ps(half, half, 1)));
}

MSDD_SIMD inline float reduce_add(Vec a) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_shuffle_ps(half, half, 1)));
}

}  // namespace
}  // namespace msdd_fast

#include "kernel.h"

namespace msdd_fast {

MSDD_SIMD void attention_task_avx2(const AttentionJob& job, std::int64_t image, std::int64_t head, std::int64_t first,
                                   std::int64_t count, float* scratch) {
    attend_any(job, image, head, first, count, scratch);
}

}  // namespace msdd_fast
#endif
