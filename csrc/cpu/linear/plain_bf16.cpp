// The tiles of the avx512bf16 level in plain C++: tests its layout on machines that cannot run it.
#include "job.h"

#define MSDD_SIMD

// clang-format off: each needs what those before it define.
#include "plain_bf16.h"
#include "emulated_lanes.h"

namespace msdd_fast {
namespace {

constexpr std::int64_t PANEL = PANEL_AVX512, ROWS = 6;

}  // namespace
}  // namespace msdd_fast

#include "micro_kernel.h"
#include "part.h"
// clang-format on

namespace msdd_fast {

void linear_task_plain_bf16(const LinearJob& job, const LinearPart& part) { run_part(job, part); }

}  // namespace msdd_fast
