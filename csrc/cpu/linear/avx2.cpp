// Products of float32 by AVX2 and FMA.
#include "job.h"

#ifdef MSDD_X86_LEVELS
#define MSDD_SIMD __attribute__((target("avx2,fma")))

#include "step_avx2.h"
#include "swiglu_avx2.h"

namespace msdd_fast {
namespace {

constexpr std::int64_t PANEL = PANEL_AVX2, ROWS = 6;  // sums in 12 of the 16 registers

}  // namespace
}  // namespace msdd_fast

#include "micro_kernel.h"
#include "part.h"

namespace msdd_fast {

MSDD_SIMD void linear_task_avx2(const LinearJob& job, const LinearPart& part) { run_part(job, part); }

}  // namespace msdd_fast
#endif
