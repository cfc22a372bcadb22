// The sums of a tile in vector registers. Needs of the level's file, besides what part.h needs:
//
//   Vec, LANES       vector of 32-bit words; ROWS x PANEL / LANES of them are the sums
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
#pragma GCC unroll 8
    for (int r = 0; r < COUNT; ++r) {
        const Vec a = LAST ? broadcast_last(x + r * stride) : broadcast(x + r * stride);
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; ++v) sums[r][v] = multiply_add(a, b[v], sums[r][v]);
    }
}

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
