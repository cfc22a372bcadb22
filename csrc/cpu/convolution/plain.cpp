// Convolutions of float32 for any machine.
#include "job.h"

#define MSDD_SIMD

// clang-format off: each needs what those before it define.
#include "../linear/step_plain.h"

namespace msdd_fast {
namespace {

constexpr std::int64_t PANEL = CONVOLUTION_PANEL, ROWS = 4;

}  // namespace
}  // namespace msdd_fast

#include "lines.h"
// clang-format on

namespace msdd_fast {

void convolution_task_plain(const ConvolutionJob& job, const ConvolutionPart& part) { run_part(job, part); }

}  // namespace msdd_fast
