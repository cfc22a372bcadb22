// Products of float32 by AVX-512.
#include "job.h"

#ifdef MSDD_X86_LEVELS
#define MSDD_SIMD __attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma")))

#include "avx512.h"
#include "swiglu_avx512.h"

namespace msdd_fast {
namespace {

using Element = float;
constexpr std::int64_t STEP = 1;

MSDD_SIMD inline Vec broadcast(const float* from) { return _mm512_set1_ps(*from); }
MSDD_SIMD inline Vec broadcast_last(const float* from) { return broadcast(from); }
MSDD_SIMD inline Vec multiply_add(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }

}  // namespace
}  // namespace msdd_fast

#include "micro_kernel.h"
#include "part.h"

namespace msdd_fast {

MSDD_SIMD void linear_task_avx512(const LinearJob& job, const LinearPart& part) { run_part(job, part); }

}  // namespace msdd_fast
#endif
