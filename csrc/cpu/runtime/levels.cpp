#include "msdd_fast/detail/levels.h"

#include <cstdlib>
#include <cstring>

#include "msdd_fast/check.h"

#ifdef MSDD_X86_LEVELS
#include <cpuid.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace msdd_fast {
namespace {

// "avx512vnni" and "avx512bf16" stand side by side.
int rank_of(const std::string& level) {
    if (level == "plain") return 0;
    if (level == "avx2") return 1;
    if (level == "avx512") return 2;
    if (level == "avx512vnni" || level == "avx512bf16") return 3;
    return level == "amx" ? 4 : -1;
}

int highest_rank() {
    static const int highest = [] {
        const char* const wanted = std::getenv("MSDD_FAST_CPU_LEVEL");
        if (wanted == nullptr || *wanted == '\0' || std::strcmp(wanted, "auto") == 0) return rank_of("amx");
        const int rank = rank_of(wanted);
        expect(rank >= 0,
               std::string("MSDD_FAST_CPU_LEVEL must be auto, plain, avx2, avx512, avx512vnni, avx512bf16 or "
                           "amx, got ") +
                   wanted);
        return rank;
    }();
    return highest;
}

#ifdef MSDD_X86_LEVELS
// Linux gives a process the tiles' registers when it asks for them.
bool has_amx() {
    static const bool has = [] {
        constexpr unsigned NEEDED = 1u << 24 | 1u << 22 | 1u << 25;  // tiles, products of bfloat16, of bytes
        unsigned a = 0, b = 0, c = 0, d = 0;
        if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0 || (d & NEEDED) != NEEDED) return false;
#if defined(__linux__)
        constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XTILEDATA = 18;
        return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XTILEDATA) == 0;
#else
        return false;
#endif
    }();
    return has;
}

bool has(const std::string& level) {
    if (level == "avx2") return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (level == "avx512")
        return has("avx2") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
               __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
    if (level == "avx512bf16") return has("avx512") && __builtin_cpu_supports("avx512bf16");
    if (level == "avx512vnni") return has("avx512") && __builtin_cpu_supports("avx512vnni");
    return level == "amx" && has("avx512bf16") && has_amx();
}
#endif

}  // namespace

bool can_run(const std::string& level) {
#ifdef MSDD_X86_LEVELS
    return rank_of(level) <= highest_rank() && has(level);
#else
    (void)level;
    return false;
#endif
}

}  // namespace msdd_fast
