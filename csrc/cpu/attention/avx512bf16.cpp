// Attention by AVX-512 with products of pairs of bfloat16: twice the multiplications of an instruction. The level
// plain_bf16 runs the same layout on machines without it.
#include "job.h"

#ifdef MSDD_X86_LEVELS
#define MSDD_SIMD __attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,avx512bf16,avx2,fma")))
#define MSDD_PAIRS

#include "../linear/narrow_avx512bf16.h"
#include "avx512.h"

namespace msdd_fast {
namespace {

MSDD_SIMD inline Vec dot(Vec a, Vec b, Vec c) {
    return _mm512_dpbf16_ps(c, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
}

MSDD_SIMD inline Vec to_pairs(Vec a, Vec b) { return reinterpret_cast<Vec>(_mm512_cvtne2ps_pbh(b, a)); }

}  // namespace
}  // namespace msdd_fast

#include "kernel.h"

namespace msdd_fast {

MSDD_SIMD void attention_task_avx512bf16(const AttentionJob& job, std::int64_t image, std::int64_t head,
                                         std::int64_t first, std::int64_t count, float* scratch) {
    attend_any(job, image, head, first, count, scratch);
}

}  // namespace msdd_fast
#endif
