// Products of bytes by AVX-512: vpdpbusd multiplies and adds four in every lane.
#include "job.h"

#ifdef MSDD_X86_LEVELS
#define MSDD_SIMD __attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,avx512vnni,avx2,fma")))

#include <cstring>

#include "msdd_fast/detail/intrinsics.h"
#include "swiglu_avx512.h"

namespace msdd_fast {
namespace {

using Element = std::uint8_t;
// Not __m512i, of whose sums gcc 12 keeps a second copy in memory.
using Vec = int __attribute__((vector_size(64)));
constexpr int LANES = 16;
constexpr std::int64_t PANEL = PANEL_AVX512, ROWS = 6, STEP = 4;

MSDD_SIMD inline Vec load(const float* from) { return reinterpret_cast<Vec>(_mm512_loadu_si512(from)); }
MSDD_SIMD inline void store(float* to, const Vec& a) { _mm512_storeu_si512(to, reinterpret_cast<__m512i>(a)); }
MSDD_SIMD inline Vec zero() { return Vec{}; }

MSDD_SIMD inline Vec broadcast(const std::uint8_t* from) {
    std::int32_t quad;
    std::memcpy(&quad, from, sizeof quad);
    return reinterpret_cast<Vec>(_mm512_set1_epi32(quad));
}

MSDD_SIMD inline Vec broadcast_last(const std::uint8_t* from) { return broadcast(from); }  // rows end with whole quads

MSDD_SIMD inline Vec multiply_add(const Vec& a, const Vec& b, const Vec& c) {
    return reinterpret_cast<Vec>(
        _mm512_dpbusd_epi32(reinterpret_cast<__m512i>(c), reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
}

}  // namespace
}  // namespace msdd_fast

#include "micro_kernel.h"
#include "part.h"

namespace msdd_fast {

MSDD_SIMD void linear_task_avx512vnni(const LinearJob& job, const LinearPart& part) { run_part(job, part); }

}  // namespace msdd_fast
#endif
