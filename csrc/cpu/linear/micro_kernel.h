// The sums of a tile in vector registers: ROWS x PANEL / LANES of them. Needs what step.h and part.h need.
//
// No include guard: each level includes this exactly once.

#include "step.h"

namespace msdd_fast {
namespace {

// A function of its own, so that the loop has all registers to itself.
template <int COUNT>
MSDD_SIMD MSDD_NOINLINE void tile_of(const Element* x, std::int64_t stride, const float* words, std::int64_t in,
                                     float* out) {
    Vec sums[COUNT][VECTORS];
#pragma GCC unroll 8
    for (int r = 0; r < COUNT; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; ++v) sums[r][v] = zero();
    for (std::int64_t k = 0; k + STEP <= in; k += STEP, words += PANEL) step<COUNT, false>(sums, x + k, stride, words);
    if (in % STEP != 0) step<COUNT, true>(sums, x + in - 1, stride, words);
#pragma GCC unroll 8
    for (int r = 0; r < COUNT; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; ++v) store(out + r * PANEL + v * LANES, sums[r][v]);
}

MSDD_SIMD inline void tile(const Element* x, std::int64_t stride, std::int64_t rows, const float* words,
                           std::int64_t in, float* out) {
    static_assert(ROWS == 4 || ROWS == 6);
    switch (rows) {
        case 1:
            return tile_of<1>(x, stride, words, in, out);
        case 2:
            return tile_of<2>(x, stride, words, in, out);
        case 3:
            return tile_of<3>(x, stride, words, in, out);
        case 4:
            return tile_of<4>(x, stride, words, in, out);
        case 5:
            return tile_of<ROWS == 4 ? 4 : 5>(x, stride, words, in, out);
        default:
            return tile_of<ROWS>(x, stride, words, in, out);
    }
}

MSDD_SIMD inline void begin_tiles() {}
MSDD_SIMD inline void end_tiles() {}

}  // namespace
}  // namespace msdd_fast
