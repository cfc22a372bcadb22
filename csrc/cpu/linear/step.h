// One step of the sums of a tile in vector registers. Needs of the level's file, besides Element, STEP and PANEL:
//
//   Vec, LANES       vector of 32-bit words
//   load store zero
//   broadcast        one step of a row of x in every lane: a float, a pair of bfloat16, or four bytes
//   broadcast_last   (pairs) the last element of a row of odd length, and zero
//   multiply_add     (a, b, c): a * b + c, summed over the pair or the four
//
// No include guard: each level includes this exactly once.

#include "msdd_fast/detail/bits.h"

namespace msdd_fast {
namespace {

constexpr int VECTORS = PANEL / LANES;

// One step of rows at `x`. LAST: of a single element.
template <int COUNT, bool LAST>
MSDD_SIMD inline void step(Vec (&sums)[COUNT][VECTORS], const Element* x, std::int64_t stride, const float* words) {
    Vec b[VECTORS];
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) b[v] = load(words + v * LANES);
#pragma GCC unroll 16
    for (int r = 0; r < COUNT; ++r) {
        const Vec a = LAST ? broadcast_last(x + r * stride) : broadcast(x + r * stride);
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; ++v) sums[r][v] = multiply_add(a, b[v], sums[r][v]);
    }
}

}  // namespace
}  // namespace msdd_fast
