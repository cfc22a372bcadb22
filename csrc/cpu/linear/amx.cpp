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

// All tiles are 16 rows of 64 bytes.
struct alignas(64) TileConfig {
    std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
    std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileConfig) == 64);

MSDD_SIMD inline void begin_tiles() {
    const TileConfig config;
    _tile_loadconfig(&config);
}

MSDD_SIMD inline void end_tiles() { _tile_release(); }

}  // namespace
}  // namespace msdd_fast

// The compiler wants numbers of tiles as literals.
#define tile_zero(to) _tile_zero(to)
#define tile_load(to, from, row_bytes) _tile_loadd(to, from, row_bytes)
#define tile_store(from, to, row_bytes) _tile_stored(from, to, row_bytes)
#define tile_dot(c, a, b) _tile_dpbf16ps(c, a, b)

#include "amx.h"
#include "part.h"

namespace msdd_fast {

// Linux gives a process the tiles' registers when it asks for them.
bool linear_has_amx() {
    static const bool has = [] {
        constexpr unsigned TILES = 1u << 24, BF16 = 1u << 22;
        unsigned a = 0, b = 0, c = 0, d = 0;
        if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0 || (d & TILES) == 0 || (d & BF16) == 0) return false;
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
