// Heads of bfloat16 by AVX-512: normalised, rotated and rounded in one pass through the registers.
#include "msdd_fast/detail/lanes_avx512bf16.h"

#ifdef MSDD_X86_LEVELS
#define MSDD_SIMD MSDD_AVX512BF16 inline

#include "job.h"

namespace msdd_fast {
namespace {

using avx512bf16::LANES;

// One for each element: a pair (even, odd) becomes (even, odd) * cos + (odd, even) * (-sin, sin).
struct Angles {
    alignas(64) float cos[MAX_ROPE_HEAD_DIM], sin[MAX_ROPE_HEAD_DIM];
    bool rotate;

    MSDD_SIMD Angles(const float* cosines, const float* sines, std::int64_t d) : rotate(sines != nullptr) {
        for (std::int64_t i = 0; i < d / 2; ++i) cos[2 * i] = cos[2 * i + 1] = cosines[i];
        if (!rotate) return;
        for (std::int64_t i = 0; i < d / 2; ++i) {
            sin[2 * i] = -sines[i];
            sin[2 * i + 1] = sines[i];
        }
    }
};

// Elements i to i + 15 of a head, or the first of them: those that `keep` has.
MSDD_SIMD __m512 turned(const Head& head, const Angles& angles, std::int64_t i, __mmask16 keep) {
    __m512 y = _mm512_maskz_loadu_ps(keep, head.x + i);
    if (head.bias != nullptr) y = _mm512_sub_ps(y, _mm512_set1_ps(head.mean));
    y = _mm512_mul_ps(_mm512_mul_ps(y, _mm512_set1_ps(head.factor)), _mm512_maskz_loadu_ps(keep, head.weight + i));
    if (head.bias != nullptr) y = _mm512_add_ps(y, _mm512_maskz_loadu_ps(keep, head.bias + i));
    const __m512 kept = _mm512_mul_ps(y, _mm512_maskz_load_ps(keep, angles.cos + i));
    if (!angles.rotate) return kept;
    constexpr int SWAP = 0xB1;  // of neighbours
    return _mm512_add_ps(kept, _mm512_mul_ps(_mm512_permute_ps(y, SWAP), _mm512_maskz_load_ps(keep, angles.sin + i)));
}

class Chunk {
  public:
    MSDD_SIMD Chunk(const QkNormRope& job, std::int64_t at)
        : out_(static_cast<BFloat16*>(job.out) + at), size_(job.shape.head_dim) {}

    template <int D>
    MSDD_SIMD void write(std::int64_t at, const Head& head, const Angles& angles) {
        const std::int64_t d = D == 0 ? size_ : D, whole = d / LANES * LANES;
        BFloat16* const out = out_ + at;
#pragma GCC unroll 8
        for (std::int64_t i = 0; i < whole; i += LANES)
            avx512bf16::store(out + i, avx512bf16::narrow(turned(head, angles, i, 0xFFFF)));
        if (whole == d) return;
        const auto rest = static_cast<__mmask16>((1 << (d - whole)) - 1);
        _mm256_mask_storeu_epi16(out + whole, rest, avx512bf16::narrow(turned(head, angles, whole, rest)));
    }

    MSDD_SIMD void finish(std::int64_t) {}

  private:
    BFloat16* out_;
    std::int64_t size_;
};

}  // namespace
}  // namespace msdd_fast

#include "tokens.h"

namespace msdd_fast {

MSDD_AVX512BF16 void qk_norm_rope_tokens_avx512bf16(const QkNormRope& job, std::int64_t begin, std::int64_t end) {
    tokens_of_level(job, begin, end);
}

}  // namespace msdd_fast
#endif
