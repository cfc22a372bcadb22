// The tiles of the avx512bf16 level in plain C++: tests its layout on machines that cannot run it.
#include "job.h"

#define MSDD_SIMD

#include "plain_bf16.h"

namespace msdd_fast {
namespace {

constexpr int LANES = 16;
constexpr std::int64_t ROWS = 6;

struct Vec {
    float lane[LANES];
};

inline Vec zero() { return {}; }
inline void store(float* to, const Vec& a) { std::memcpy(to, &a, sizeof a); }
inline Vec load(const float* from) {
    Vec result;
    std::memcpy(&result, from, sizeof result);
    return result;
}

inline Vec all_lanes(const BFloat16 (&pair)[2]) {
    Vec result;
    for (auto& lane : result.lane) std::memcpy(&lane, pair, sizeof pair);
    return result;
}

inline Vec broadcast(const BFloat16* from) { return all_lanes({from[0], from[1]}); }
inline Vec broadcast_last(const BFloat16* from) { return all_lanes({from[0], {0}}); }

inline Vec multiply_add(const Vec& a, const Vec& b, Vec c) {
    for (int i = 0; i < LANES; ++i) c.lane[i] = add_products(a.lane[i], b.lane[i], c.lane[i]);
    return c;
}

}  // namespace
}  // namespace msdd_fast

#include "micro_kernel.h"
#include "part.h"

namespace msdd_fast {

void linear_task_plain_bf16(const LinearJob& job, const LinearPart& part) { run_part(job, part); }

}  // namespace msdd_fast
