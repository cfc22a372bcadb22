// Pairs of bfloat16 in plain C++, for the levels that emulate instructions.
#include <cstring>

#include "msdd_fast/dtype.h"

namespace msdd_fast {
namespace {

using Element = BFloat16;
constexpr std::int64_t STEP = 2;

inline BFloat16 half_of(float pair, int which) {
    BFloat16 halves[2];
    std::memcpy(halves, &pair, sizeof halves);
    return halves[which];
}

// c + a0 * b0 + a1 * b1 for pairs a and b.
inline float add_products(float a, float b, float c) {
    for (int which = 0; which < 2; ++which) c += to_float(half_of(a, which)) * to_float(half_of(b, which));
    return c;
}

}  // namespace
}  // namespace msdd_fast
