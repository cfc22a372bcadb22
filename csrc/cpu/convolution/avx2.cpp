// Convolutions of float32 by AVX2 and FMA.
#include "job.h"

#ifdef MSDD_X86_LEVELS
#define MSDD_SIMD __attribute__((target("avx2,fma")))

// clang-format off: each needs what those before it define.
#include "../linear/step_avx2.h"
#include "../linear/swiglu_avx2.h"

namespace msdd_fast {
namespace {

constexpr std::int64_t PANEL = CONVOLUTION_PANEL, ROWS = 6;  // sums in 12 of the 16 registers

}  // namespace
}  // namespace msdd_fast

#include "lines.h"
// clang-format on

namespace msdd_fast {

MSDD_SIMD void convolution_task_avx2(const ConvolutionJob& job, const ConvolutionPart& part) { run_part(job, part); }

}  // namespace msdd_fast
#endif
