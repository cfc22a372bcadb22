// Products of float32 for any machine.
#include "job.h"

#define MSDD_SIMD

#include "step_plain.h"

namespace msdd_fast {
namespace {

constexpr std::int64_t PANEL = PANEL_PLAIN, ROWS = 4;  // sums fill half of NEON's registers

}  // namespace
}  // namespace msdd_fast

#include "micro_kernel.h"
#include "part.h"

namespace msdd_fast {

void linear_task_plain(const LinearJob& job, const LinearPart& part) { run_part(job, part); }

}  // namespace msdd_fast
