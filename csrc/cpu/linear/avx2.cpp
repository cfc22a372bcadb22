// Products of float32 by AVX2 and FMA: 6 x 16 sums in 12 of the 16 registers.
#include "job.h"

#ifdef MSDD_X86_LEVELS
#define MSDD_SIMD __attribute__((target("avx2,fma")))

#include "msdd_fast/detail/intrinsics.h"
#include "swiglu_avx2.h"

namespace msdd_fast {
namespace {

using Element = float;
using Vec = __m256;
constexpr int LANES = 8;
constexpr std::int64_t PANEL = PANEL_AVX2, ROWS = 6, STEP = 1;

MSDD_SIMD inline Vec load(const float* from) { return _mm256_loadu_ps(from); }
MSDD_SIMD inline void store(float* to, Vec a) { _mm256_storeu_ps(to, a); }
MSDD_SIMD inline Vec zero() { return _mm256_setzero_ps(); }
MSDD_SIMD inline Vec broadcast(const float* from) { return _mm256_set1_ps(*from); }
MSDD_SIMD inline Vec broadcast_last(const float* from) { return broadcast(from); }
MSDD_SIMD inline Vec multiply_add(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }

}  // namespace
}  // namespace msdd_fast

#include "micro_kernel.h"
#include "part.h"

namespace msdd_fast {

MSDD_SIMD void linear_task_avx2(const LinearJob& job, const LinearPart& part) { run_part(job, part); }

}  // namespace msdd_fast
#endif
