// Rows of bfloat16 by AVX-512: sum, rounding and its result in one pass through the registers.
#include "msdd_fast/detail/lanes_avx512bf16.h"

#ifdef MSDD_X86_LEVELS
#define MSDD_SIMD MSDD_AVX512BF16 inline

#include "job.h"

namespace msdd_fast {
namespace {

using avx512bf16::LANES;

MSDD_SIMD const float* row_of(const NormModulate& job, std::int64_t r, const float* gate, float* buffer) {
    const std::int64_t width = job.shape.width, whole = width / LANES * LANES, at = r * width;
    const BFloat16* const x = static_cast<const BFloat16*>(job.x) + at;
    if (job.y.data == nullptr) {
        for (std::int64_t i = 0; i < whole; i += LANES) _mm512_storeu_ps(buffer + i, avx512bf16::load(x + i));
        for (std::int64_t i = whole; i < width; ++i) buffer[i] = to_float(x[i]);
        return buffer;
    }
    const BFloat16* const y = static_cast<const BFloat16*>(job.y.data) + at;
    BFloat16* const x_new = static_cast<BFloat16*>(job.x_new) + at;
    for (std::int64_t i = 0; i < whole; i += LANES) {
        const __m512 gated = _mm512_mul_ps(_mm512_loadu_ps(gate + i), avx512bf16::load(y + i));
        const __m256i sum = avx512bf16::narrow(_mm512_add_ps(avx512bf16::load(x + i), gated));
        avx512bf16::store(x_new + i, sum);
        _mm512_storeu_ps(buffer + i, avx512bf16::widen(sum));
    }
    for (std::int64_t i = whole; i < width; ++i) {
        x_new[i] = from_float<BFloat16>(to_float(x[i]) + gate[i] * to_float(y[i]));
        buffer[i] = to_float(x_new[i]);
    }
    return buffer;
}

MSDD_SIMD void write_row(const NormModulate& job, std::int64_t at, const float* x, float mean, float inverse,
                         const float* factors, const float* shift) {
    const std::int64_t width = job.shape.width, whole = width / LANES * LANES;
    BFloat16* const h = static_cast<BFloat16*>(job.h) + at;
    const __m512 means = _mm512_set1_ps(mean), inverses = _mm512_set1_ps(inverse);
    for (std::int64_t i = 0; i < whole; i += LANES) {
        const __m512 normal = _mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(x + i), means), inverses);
        const __m512 scaled = _mm512_mul_ps(normal, _mm512_loadu_ps(factors + i));
        avx512bf16::store(h + i, avx512bf16::narrow(_mm512_add_ps(scaled, _mm512_loadu_ps(shift + i))));
    }
    for (std::int64_t i = whole; i < width; ++i)
        h[i] = from_float<BFloat16>((x[i] - mean) * inverse * factors[i] + shift[i]);
}

}  // namespace
}  // namespace msdd_fast

#include "rows.h"

namespace msdd_fast {

MSDD_AVX512BF16 void norm_modulate_rows_avx512bf16(const NormModulate& job, std::int64_t begin, std::int64_t end) {
    rows_of_level(job, begin, end);
}

}  // namespace msdd_fast
#endif
