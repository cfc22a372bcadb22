// Products of bfloat16 by AMX. The level plain_amx runs the same tiles on machines without it.
#include "job.h"

#ifdef MSDD_X86_LEVELS
#define MSDD_SIMD __attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,avx512bf16,avx2,fma,amx-tile,amx-bf16")))

#include <cpuid.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

// gcc 12 takes the deliberately undefined registers inside its own intrinsics for mistakes (GCC bug 105593).
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include "narrow_avx512bf16.h"

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

// Linux gives a process the tiles' registers when it asks for them.
bool linear_has_amx() {
    static const bool has = [] {
        constexpr unsigned TILES = 1u << 24, BF16 = 1u << 22, INT8 = 1u << 25;
        unsigned a = 0, b = 0, c = 0, d = 0;
        if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0 || (d & (TILES | BF16 | INT8)) != (TILES | BF16 | INT8))
            return false;
#if defined(__linux__)
        constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XTILEDATA = 18;
        return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XTILEDATA) == 0;
#else
        return false;
#endif
    }();
    return has;
}

MSDD_SIMD void linear_task_amx(const LinearJob& job, const LinearPart& part) { run_part(job, part); }

}  // namespace msdd_fast
#endif
