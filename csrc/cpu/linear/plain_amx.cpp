// The tiles of the amx level for bfloat16 in plain C++: tests its layout on machines that cannot run it.
#include "job.h"

#define MSDD_SIMD

// clang-format off: each needs what those before it define.
#include "plain_bf16.h"
#include "emulated_tiles.h"

namespace msdd_fast {
namespace {

constexpr std::int64_t PANEL = PANEL_AVX512;

}  // namespace
}  // namespace msdd_fast

#include "amx.h"
#include "part.h"
// clang-format on

namespace msdd_fast {

void linear_task_plain_amx(const LinearJob& job, const LinearPart& part) { run_part(job, part); }

}  // namespace msdd_fast
