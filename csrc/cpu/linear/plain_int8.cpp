// The tiles of the avx512vnni level in plain C++: tests its layout on machines that cannot run it.
#include "job.h"

#define MSDD_SIMD

// clang-format off: each needs what those before it define.
#include "plain_int8.h"
#include "emulated_lanes.h"

namespace msdd_fast {
namespace {

constexpr std::int64_t ROWS = 6;

}  // namespace
}  // namespace msdd_fast

#include "micro_kernel.h"
#include "part.h"
// clang-format on

namespace msdd_fast {

void linear_task_plain_int8(const LinearJob& job, const LinearPart& part) { run_part(job, part); }

}  // namespace msdd_fast
