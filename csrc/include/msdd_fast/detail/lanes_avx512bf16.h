// Sixteen bfloat16 to and from float32 lanes, by the instructions of AVX-512 for bfloat16. Bitwise equal to dtype.h.
#pragma once

#include "msdd_fast/detail/levels.h"
#include "msdd_fast/dtype.h"

#ifdef MSDD_X86_LEVELS
#include "msdd_fast/detail/intrinsics.h"

#define MSDD_AVX512BF16 __attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,avx512bf16,avx2,fma")))

namespace msdd_fast {
namespace avx512bf16 {

constexpr std::int64_t LANES = 16;

MSDD_AVX512BF16 inline __m512 widen(__m256i bits) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

MSDD_AVX512BF16 inline __m512 load(const BFloat16* from) {
    return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}

MSDD_AVX512BF16 inline void store(BFloat16* to, __m256i bits) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), bits);
}

MSDD_AVX512BF16 inline __m256i narrow(__m512 values) {
    constexpr int SUBNORMAL = 0x20;
    if (__builtin_expect(_mm512_fpclass_ps_mask(values, SUBNORMAL) == 0, 1))
        return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(values));
    // The instruction would make zeros of them.
    alignas(64) float wide[LANES];
    alignas(32) BFloat16 rounded[LANES];
    _mm512_store_ps(wide, values);
    msdd_fast::narrow<BFloat16>(wide, LANES, rounded);
    return _mm256_load_si256(reinterpret_cast<const __m256i*>(rounded));
}

}  // namespace avx512bf16
}  // namespace msdd_fast
#endif
