// Products of bfloat16 by AVX-512: vdpbf16ps multiplies and adds a pair in every lane.
#include "job.h"

#ifdef MSDD_X86_LEVELS
#define MSDD_SIMD __attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,avx512bf16,avx2,fma")))

#include "avx512.h"
#include "narrow_avx512bf16.h"
#include "step_avx512bf16.h"
#include "swiglu_avx512.h"

namespace msdd_fast {
namespace {

constexpr std::int64_t PANEL = PANEL_AVX512, ROWS = 6;  // sums in 24 of the 32 registers

}  // namespace
}  // namespace msdd_fast

#include "micro_kernel.h"
#include "part.h"

namespace msdd_fast {

MSDD_SIMD void linear_task_avx512bf16(const LinearJob& job, const LinearPart& part) { run_part(job, part); }

}  // namespace msdd_fast
#endif
