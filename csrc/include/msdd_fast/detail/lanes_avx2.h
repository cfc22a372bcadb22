// Eight elements of any element type to and from float32 lanes, for memory-bound ops. Converts in registers, where
// floats.h uses buffers. Bitwise equal to dtype.h.
#pragma once

#include "msdd_fast/detail/simd.h"
#include "msdd_fast/dtype.h"

#ifdef MSDD_SIMD_DISPATCH
#include <immintrin.h>

#define MSDD_AVX2 __attribute__((target("avx2,f16c")))

namespace msdd_fast {

// Whether this machine has the instructions.
inline bool has_avx2() {
    static const bool has = [] {
        __builtin_cpu_init();
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
    }();
    return has;
}

namespace avx2 {

MSDD_AVX2 inline __m128i load_bits(const void* from) { return _mm_loadu_si128(static_cast<const __m128i*>(from)); }
MSDD_AVX2 inline void store_bits(void* to, __m128i bits) { _mm_storeu_si128(static_cast<__m128i*>(to), bits); }

MSDD_AVX2 inline __m256 load(const float* from) { return _mm256_loadu_ps(from); }
MSDD_AVX2 inline __m256 load(const Float16* from) { return _mm256_cvtph_ps(load_bits(from)); }
MSDD_AVX2 inline __m256 load(const BFloat16* from) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_bits(from)), 16));
}

MSDD_AVX2 inline __m128i low_halves(__m256i words) {  // of words below 2^16
    return _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
}

MSDD_AVX2 inline void store(float* to, __m256 values) { _mm256_storeu_ps(to, values); }
MSDD_AVX2 inline void store(Float16* to, __m256 values) {
    store_bits(to, _mm256_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT));
}
MSDD_AVX2 inline void store(BFloat16* to, __m256 values) {
    const __m256i bits = _mm256_castps_si256(values);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(values, values, _CMP_UNORD_Q));
    store_bits(to, low_halves(_mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, is_nan), 16)));
}

}  // namespace avx2
}  // namespace msdd_fast
#endif
