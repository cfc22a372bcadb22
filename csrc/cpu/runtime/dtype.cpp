#include "msdd_fast/dtype.h"

#include "msdd_fast/detail/simd.h"

#ifdef MSDD_SIMD_DISPATCH
#include <immintrin.h>
#endif

namespace msdd_fast {

MSDD_SIMD_CLONES void widen_plainly(const Float16* source, std::int64_t count, float* target) {
    widen<Float16>(source, count, target);
}

MSDD_SIMD_CLONES void narrow_plainly(const float* source, std::int64_t count, Float16* target) {
    narrow<Float16>(source, count, target);
}

#ifdef MSDD_SIMD_DISPATCH

namespace {

const bool has_f16c = [] {
    __builtin_cpu_init();
    return __builtin_cpu_supports("f16c") != 0;
}();

// Whole vectors; returns how many elements that was.
__attribute__((target("avx,f16c"))) std::int64_t widen_f16c(const Float16* source, std::int64_t count, float* target) {
    std::int64_t i = 0;
    for (; i + 8 <= count; i += 8)
        _mm256_storeu_ps(target + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source + i))));
    return i;
}

__attribute__((target("avx,f16c"))) std::int64_t narrow_f16c(const float* source, std::int64_t count, Float16* target) {
    std::int64_t i = 0;
    for (; i + 8 <= count; i += 8)
        _mm_storeu_si128(reinterpret_cast<__m128i*>(target + i),
                         _mm256_cvtps_ph(_mm256_loadu_ps(source + i), _MM_FROUND_TO_NEAREST_INT));
    return i;
}

}  // namespace

void widen(const Float16* source, std::int64_t count, float* target) {
    const std::int64_t done = has_f16c ? widen_f16c(source, count, target) : 0;
    widen_plainly(source + done, count - done, target + done);
}

void narrow(const float* source, std::int64_t count, Float16* target) {
    const std::int64_t done = has_f16c ? narrow_f16c(source, count, target) : 0;
    narrow_plainly(source + done, count - done, target + done);
}

#else

void widen(const Float16* source, std::int64_t count, float* target) { widen_plainly(source, count, target); }

void narrow(const float* source, std::int64_t count, Float16* target) { narrow_plainly(source, count, target); }

#endif

}  // namespace msdd_fast
