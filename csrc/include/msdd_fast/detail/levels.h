// The SIMD levels that kernels are written for by hand, and which of them this machine runs.
#pragma once

#include <string>

#if defined(__x86_64__) && defined(__GNUC__)
#define MSDD_X86_LEVELS
#endif

namespace msdd_fast {

// Whether this machine runs the code of "avx2", "avx512", "avx512vnni", "avx512bf16" or "amx", and
// MSDD_FAST_CPU_LEVEL allows it: "plain", or the highest level to use, for measurements of machines that have no more.
// False for any other name. Throws std::invalid_argument for another value of the variable.
bool can_run(const std::string& level);

}  // namespace msdd_fast
