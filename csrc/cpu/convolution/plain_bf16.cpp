// The tiles of the avx512bf16 level in plain C++: tests its layout on machines that cannot run it.
#include "job.h"

#define MSDD_SIMD

// clang-format off: each needs what those before it define.
#include "../linear/plain_bf16.h"
#include "../linear/emulated_lanes.h"

namespace msdd_fast {
namespace {

constexpr std::int64_t PANEL = CONVOLUTION_PANEL_AVX512, ROWS = 12;

}  // namespace
}  // namespace msdd_fast

#include "lines.h"
// clang-format on

namespace msdd_fast {

void convolution_task_plain_bf16(const ConvolutionJob& job, const ConvolutionPart& part) { run_part(job, part); }

}  // namespace msdd_fast
