// The plain level with products of pairs: tests the layout of the avx512bf16 level on machines that cannot run it.
#include "msdd_fast/dtype.h"
#include "plain.h"

#define MSDD_PAIRS

namespace msdd_fast {
namespace {

inline BFloat16 half_of(float pair, int which) {
    BFloat16 halves[2];
    std::memcpy(halves, &pair, sizeof halves);
    return halves[which];
}

// c + a0 * b0 + a1 * b1 for the pairs (0, 1) of every lane.
inline Vec dot(const Vec& a, const Vec& b, const Vec& c) {
    return each([&](int i) {
        const auto product = [&](int which) {
            return to_float(half_of(a.lane[i], which)) * to_float(half_of(b.lane[i], which));
        };
        return c.lane[i] + product(0) + product(1);
    });
}

// The numbers of a, then those of b.
inline Vec to_pairs(const Vec& a, const Vec& b) {
    BFloat16 all[2 * LANES];
    for (int i = 0; i < LANES; ++i) {
        all[i] = from_float<BFloat16>(a.lane[i]);
        all[LANES + i] = from_float<BFloat16>(b.lane[i]);
    }
    Vec result;
    std::memcpy(&result, all, sizeof result);
    return result;
}

}  // namespace
}  // namespace msdd_fast

#include "kernel.h"

namespace msdd_fast {

void attention_task_plain_bf16(const AttentionJob& job, std::int64_t image, std::int64_t head, std::int64_t first,
                               std::int64_t count, float* scratch) {
    attend_any(job, image, head, first, count, scratch);
}

}  // namespace msdd_fast
