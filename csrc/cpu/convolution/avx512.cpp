// Convolutions of float32 by AVX-512.
#include "job.h"

#ifdef MSDD_X86_LEVELS
#define MSDD_SIMD __attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma")))

// clang-format off: each needs what those before it define.
#include "../linear/avx512.h"
#include "../linear/step_avx512.h"
#include "../linear/swiglu_avx512.h"

namespace msdd_fast {
namespace {

constexpr std::int64_t PANEL = CONVOLUTION_PANEL_AVX512, ROWS = 12;  // sums in 24 of the 32 registers

}  // namespace
}  // namespace msdd_fast

#include "lines.h"
// clang-format on

namespace msdd_fast {

MSDD_SIMD void convolution_task_avx512(const ConvolutionJob& job, const ConvolutionPart& part) { run_part(job, part); }

}  // namespace msdd_fast
#endif
