// Products of bfloat16 by AMX. The level plain_amx runs the same tiles on machines without it.
#include "job.h"

#ifdef MSDD_X86_LEVELS
#define MSDD_SIMD __attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,avx512bf16,avx2,fma,amx-tile,amx-bf16")))

#include "narrow_avx512bf16.h"
#include "swiglu_avx512.h"

namespace msdd_fast {
namespace {

using Element = BFloat16;
constexpr std::int64_t PANEL = PANEL_AVX512, STEP = 2;

}  // namespace
}  // namespace msdd_fast

#include "tiles_amx.h"
#define tile_dot(c, a, b) _tile_dpbf16ps(c, a, b)

#include "amx.h"
#include "part.h"

namespace msdd_fast {

MSDD_SIMD void linear_task_amx(const LinearJob& job, const LinearPart& part) { run_part(job, part); }

}  // namespace msdd_fast
#endif
