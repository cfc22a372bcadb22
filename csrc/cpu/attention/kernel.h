// Attention of one head in terms of vectors. Each SIMD level's file defines what a vector is and then includes this:
//
//   MSDD_SIMD            attribute of functions that use the level's instructions
//   Vec, LANES, ROWS     vector of floats; ROWS x 2 of them are the sums that the registers hold
//   load store set fma add sub mul max scale_by_power reduce_max reduce_add transpose_8x8
//   MSDD_PAIRS           if it multiplies pairs of bfloat16, and then also dot and to_pairs
//   MSDD_NARROW          as in linear/write.h
//
// Everything has internal linkage, so levels do not clash. For one task (up to 1152 queries of a head), block by
// block of keys: K^T and V are converted to float32 and packed in panels two vectors wide, then for each tile of 24
// queries scores = q K^T, weights = exp(scores - maximum), sums = sums * correction + weights V. Both products are the
// same routine. A row's arithmetic depends on nothing but the row and the keys.
//
// With pairs, bfloat16 stays as it is: a float's place holds two numbers that are neighbours in the depth of the
// product (of the head size, of the keys), and the weights are rounded. Sums and softmax are float32 either way.
//
// No include guard: each level includes this exactly once.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "../linear/write.h"
#include "job.h"

namespace msdd_fast {
namespace {

constexpr std::int64_t PANEL = 2 * LANES;
static_assert(TILE_QUERIES % ROWS == 0 && BLOCK_KEYS % PANEL == 0, "blocks are whole");

#ifdef MSDD_PAIRS
constexpr bool HAS_PAIRS = true;
#else
constexpr bool HAS_PAIRS = false;
MSDD_SIMD inline Vec dot(Vec, Vec, Vec c) { return c; }  // named, not called
MSDD_SIMD inline Vec to_pairs(Vec a, Vec) { return a; }
#endif

// Whether numbers of this type are multiplied in pairs.
template <class T>
constexpr bool PAIRS = HAS_PAIRS && std::is_same_v<T, BFloat16>;

// c[ROWS][VECTORS vectors] = a[ROWS][depth] b[depth][PANEL], or c += that; depth in numbers or pairs.
template <bool IN_PAIRS, int VECTORS = 2>
MSDD_SIMD inline void multiply(const float* a, std::int64_t a_stride, const float* b, std::int64_t depth, float* c,
                               std::int64_t c_stride, bool accumulate) {
    Vec sums[ROWS][VECTORS];
#pragma GCC unroll 16
    for (int row = 0; row < ROWS; ++row)
        for (int j = 0; j < VECTORS; ++j) sums[row][j] = accumulate ? load(c + row * c_stride + j * LANES) : set(0.0f);
#pragma GCC unroll 4
    for (std::int64_t i = 0; i < depth; ++i) {
        Vec columns[VECTORS];
        for (int j = 0; j < VECTORS; ++j) columns[j] = load(b + i * PANEL + j * LANES);
#pragma GCC unroll 16
        for (int row = 0; row < ROWS; ++row) {
            const Vec factor = set(a[row * a_stride + i]);
            for (int j = 0; j < VECTORS; ++j)
                sums[row][j] = IN_PAIRS ? dot(factor, columns[j], sums[row][j]) : fma(factor, columns[j], sums[row][j]);
        }
    }
#pragma GCC unroll 16
    for (int row = 0; row < ROWS; ++row)
        for (int j = 0; j < VECTORS; ++j) store(c + row * c_stride + j * LANES, sums[row][j]);
}

// 2^y for y <= 0: 2^n by the exponent's bits times 2^r, |r| <= 1/2, by a polynomial (minimax, 1 at 0, evaluated by
// pairs of terms since the chain of operations is what takes the time). Relative error 1.1e-7, or 1e-4 where the
// result is ROUNDED to bfloat16, whose own is 2e-3. Below 2^-100 it stays there: next to the largest weight, 1, that is
// nothing, and subnormals are slow.
template <bool ROUNDED = false>
MSDD_SIMD inline Vec exp2_negative(Vec y) {
    y = max(set(-100.0f), y);            // a NaN goes through
    const Vec magic = set(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, in the lowest bits
    const Vec rounded = add(y, magic);
    const Vec r = sub(y, sub(rounded, magic)), r2 = mul(r, r);
    if constexpr (ROUNDED) {
        const Vec p01 = fma(set(0.6932829f), r, set(1.0f)), p23 = fma(set(0.05500906f), r, set(0.24221097f));
        return scale_by_power(fma(p23, r2, p01), rounded);
    }
    const Vec p01 = fma(set(0.6931470036506653f), r, set(1.0f));
    const Vec p23 = fma(set(0.05550733581185341f), r, set(0.24022242426872253f));
    const Vec p45 = fma(set(0.001326472731307149f), r, set(0.009671512991189957f));
    return scale_by_power(fma(fma(p45, r2, p23), r2, p01), rounded);
}

// One row of scores to weights exp(scale * (score - maximum)), as pairs from its beginning on if IN_PAIRS; the width is
// a whole number of panels. `maximum` and `total` go on from the earlier blocks' keys, whose sums must be multiplied by
// the value returned.
template <bool IN_PAIRS>
MSDD_SIMD inline float softmax_row(float* row, std::int64_t width, float scale, bool first, float& maximum,
                                   float& total) {
    Vec highest[2] = {load(row), load(row + LANES)};
    for (std::int64_t i = PANEL; i < width; i += PANEL)
        for (int half = 0; half < 2; ++half) highest[half] = max(highest[half], load(row + i + half * LANES));
    const float before = maximum;
    maximum = reduce_max(max(highest[0], highest[1]));
    if (!first) maximum = std::max(before, maximum);
    // The difference first, which is exact at the maximum: scores of any size leave the weights accurate.
    const Vec shift = set(maximum), factor = set(scale);
    Vec sums[2] = {set(0.0f), set(0.0f)};
    for (std::int64_t i = 0; i < width; i += PANEL) {
        Vec weights[2];
        for (int half = 0; half < 2; ++half) {
            weights[half] = exp2_negative<IN_PAIRS>(mul(sub(load(row + i + half * LANES), shift), factor));
            sums[half] = add(sums[half], weights[half]);
        }
        if constexpr (IN_PAIRS) {
            store(row + i / 2, to_pairs(weights[0], weights[1]));
        } else {
            store(row + i, weights[0]);
            store(row + i + LANES, weights[1]);
        }
    }
    const float sum = reduce_add(add(sums[0], sums[1]));
    if (first) {
        total = sum;
        return 1.0f;
    }
    float correction[LANES];
    store(correction, exp2_negative(set((before - maximum) * scale)));
    total = total * correction[0] + sum;
    return correction[0];
}

// A row as float32, 16 elements at a time: a count that the compiler knows makes plain vector instructions of the loop.
// <T>: inline, where the overload for float16 would be a call.
template <class T>
MSDD_SIMD inline void widen_row(const T* from, std::int64_t width, float* to) {
    const std::int64_t whole = width / 16 * 16;
    for (std::int64_t i = 0; i < whole; i += 16) widen<T>(from + i, 16, to + i);
    if (whole < width) widen<T>(from + whole, width - whole, to + whole);
}

// A row as it is. In pieces of a size that the compiler knows, which it copies by a vector, not by a call.
template <class T>
MSDD_SIMD inline void copy_row(const T* from, std::int64_t width, T* to) {
    constexpr std::int64_t PIECE = 64 / sizeof(T);
    const std::int64_t whole = width / PIECE * PIECE;
    for (std::int64_t i = 0; i < whole; i += PIECE) std::memcpy(to + i, from + i, 64);
    if (whole < width) std::memcpy(to + whole, from + whole, static_cast<std::size_t>(width - whole) * sizeof(T));
}

// Rows [0, count) of `from`, `width` wide, and zeros up to `padded`, as [padded][size] numbers or [padded][size / 2]
// pairs, size = padded_size(width).
template <class T>
MSDD_SIMD inline void pack_rows(const T* from, std::int64_t stride, std::int64_t count, std::int64_t padded,
                                std::int64_t width, float* to) {
    const std::int64_t size = padded_size(width), depth = PAIRS<T> ? size / 2 : size;
    for (std::int64_t i = 0; i < count; ++i) {
        if (width < size) std::fill(to + i * depth, to + (i + 1) * depth, 0.0f);
        if constexpr (PAIRS<T>)
            copy_row(from + i * stride, width, reinterpret_cast<T*>(to + i * depth));
        else
            widen_row(from + i * stride, width, to + i * depth);
    }
    std::fill(to + count * depth, to + padded * depth, 0.0f);
}

// Keys to K^T in panels [size or size / 2][PANEL], size = padded_size(width), zeros in the last one's rest.
template <class T>
MSDD_SIMD void pack_keys(const T* from, std::int64_t stride, std::int64_t count, std::int64_t width, float* to) {
    alignas(64) float rows[8 * MAX_HEAD_SIZE];
    const std::int64_t size = padded_size(width), depth = PAIRS<T> ? size / 2 : size;  // a multiple of 8
    for (std::int64_t key = 0; key < (count + PANEL - 1) / PANEL * PANEL; key += 8) {
        const std::int64_t there = std::clamp<std::int64_t>(count - key, 0, 8);
        pack_rows(from + key * stride, stride, there, 8, width, rows);
        float* const panel = to + key / PANEL * PANEL * depth + key % PANEL;
        for (std::int64_t i = 0; i < depth; i += 8) transpose_8x8(rows + i, depth, panel + i * PANEL, PANEL);
    }
}

// The first `count` pairs (even, odd), zeros up to SIZE.
template <int SIZE>
MSDD_SIMD inline void interleave(const BFloat16* even, const BFloat16* odd, std::int64_t count, float* to) {
    std::uint32_t pairs[SIZE];
    for (std::int64_t i = 0; i < count; ++i) pairs[i] = even[i].bits | static_cast<std::uint32_t>(odd[i].bits) << 16;
    for (std::int64_t i = count; i < SIZE; ++i) pairs[i] = 0;
    std::memcpy(to, pairs, sizeof pairs);
}

// Rows 2j and 2j + 1 as pairs: panels [ceil(count / 2)][PANEL] of the width, zeros beside and below.
MSDD_SIMD inline void pack_value_pairs(const BFloat16* from, std::int64_t stride, std::int64_t count,
                                       std::int64_t width, float* to) {
    const BFloat16 zeros[MAX_HEAD_SIZE] = {};
    for (std::int64_t i = 0; i < width; i += PANEL) {
        const std::int64_t there = std::min(PANEL, width - i);
        for (std::int64_t key = 0; key < count; key += 2, to += PANEL) {
            const BFloat16 *even = from + key * stride + i, *odd = key + 1 < count ? even + stride : zeros;
            if (there == PANEL)
                interleave<PANEL>(even, odd, PANEL, to);  // a count that the compiler knows
            else
                interleave<PANEL>(even, odd, there, to);
        }
    }
}

// Values in panels [count][PANEL] of the width, zeros in the last one's rest.
template <class T>
MSDD_SIMD void pack_values(const T* from, std::int64_t stride, std::int64_t count, std::int64_t width, float* to) {
    for (std::int64_t i = 0; i < width; i += PANEL) {
        const std::int64_t there = std::min(PANEL, width - i);
        for (std::int64_t key = 0; key < count; ++key, to += PANEL) {
            widen_row(from + key * stride + i, there, to);
            std::fill(to + there, to + PANEL, 0.0f);
        }
    }
}

// A row of the result from its sums, which it overwrites: whole panels of them.
template <class T>
MSDD_SIMD inline void write_row(float* sums, float total, const T* accumulate, std::int64_t width, T* out) {
    const Vec inverse = set(1.0f / total);
    for (std::int64_t i = 0; i < width; i += LANES) store(sums + i, mul(load(sums + i), inverse));
    if (accumulate != nullptr) {
        alignas(64) float base[(MAX_HEAD_SIZE + PANEL - 1) / PANEL * PANEL];
        widen_row(accumulate, width, base);
        std::fill(base + width, base + (width + LANES - 1) / LANES * LANES, 0.0f);
        for (std::int64_t i = 0; i < width; i += LANES) store(sums + i, add(load(sums + i), load(base + i)));
    }
    write(sums, width, out);
}

template <class T>
T* row_of(const HeadsView& view, std::int64_t image, std::int64_t token, std::int64_t head) {
    return static_cast<T*>(view.data) + image * view.batch + token * view.token + head * view.head;
}

template <class T>
MSDD_SIMD void attend(const AttentionJob& job, std::int64_t image, std::int64_t head, std::int64_t first,
                      std::int64_t count, float* scratch) {
    constexpr bool IN_PAIRS = PAIRS<T>;
    const std::int64_t d = job.shape.head_size, width = (d + PANEL - 1) / PANEL * PANEL;
    const std::int64_t size = padded_size(d), depth = IN_PAIRS ? size / 2 : size;  // of q K^T
    // exp(s / sqrt(d)) = 2^(scale * s)
    const float scale = static_cast<float>(1.4426950408889634 / std::sqrt(static_cast<double>(d)));
    float* const keys = scratch;
    float* const values = keys + BLOCK_KEYS * size;
    float* const queries = values + BLOCK_KEYS * width;
    float* const sums = queries + TASK_QUERIES * size;
    float* const scores = sums + TASK_QUERIES * width;
    float* const maxima = scores + TILE_QUERIES * BLOCK_KEYS;
    float* const totals = maxima + TASK_QUERIES;

    const std::int64_t padded = (count + ROWS - 1) / ROWS * ROWS;
    pack_rows<T>(row_of<T>(job.q, image, first, head), job.q.token, count, padded, d, queries);
    for (std::int64_t begin = 0; begin < job.shape.keys; begin += BLOCK_KEYS) {
        const bool is_first = begin == 0;
        const std::int64_t block = std::min(BLOCK_KEYS, job.shape.keys - begin);
        const std::int64_t columns = (block + PANEL - 1) / PANEL * PANEL;
        pack_keys<T>(row_of<T>(job.k, image, begin, head), job.k.token, block, d, keys);
        if constexpr (IN_PAIRS)
            pack_value_pairs(row_of<T>(job.v, image, begin, head), job.v.token, block, d, values);
        else
            pack_values<T>(row_of<T>(job.v, image, begin, head), job.v.token, block, d, values);
        const std::int64_t value_rows = IN_PAIRS ? (block + 1) / 2 : block;
        for (std::int64_t tile = 0; tile < padded; tile += TILE_QUERIES) {
            const std::int64_t rows = std::min(TILE_QUERIES, padded - tile);
            for (std::int64_t column = 0; column < columns; column += PANEL)
                for (std::int64_t row = 0; row < rows; row += ROWS) {
                    const float *a = queries + (tile + row) * depth, *b = keys + column * depth;
                    float* const c = scores + row * columns + column;
                    if (block - column <= LANES)  // the panel's other half holds no keys; it is filled below
                        multiply<IN_PAIRS, 1>(a, depth, b, depth, c, columns, false);
                    else
                        multiply<IN_PAIRS>(a, depth, b, depth, c, columns, false);
                }
            for (std::int64_t row = 0; row < rows; ++row) {
                float* const these = scores + row * columns;
                std::fill(these + block, these + columns, -INFINITY);
                const std::int64_t at = tile + row;
                const float correction = softmax_row<IN_PAIRS>(these, columns, scale, is_first, maxima[at], totals[at]);
                if (is_first || correction == 1.0f) continue;
                const Vec factor = set(correction);
                for (std::int64_t i = 0; i < width; i += LANES)
                    store(sums + at * width + i, mul(load(sums + at * width + i), factor));
            }
            for (std::int64_t i = 0; i < width; i += PANEL)
                for (std::int64_t row = 0; row < rows; row += ROWS)
                    multiply<IN_PAIRS>(scores + row * columns, columns, values + i * value_rows, value_rows,
                                       sums + (tile + row) * width + i, width, !is_first);
        }
    }
    for (std::int64_t i = 0; i < count; ++i) {
        const T* base = job.accumulate.data ? row_of<T>(job.accumulate, image, first + i, head) : nullptr;
        write_row<T>(sums + i * width, totals[i], base, d, row_of<T>(job.out, image, first + i, head));
    }
}

MSDD_SIMD inline void attend_any(const AttentionJob& job, std::int64_t image, std::int64_t head, std::int64_t first,
                                 std::int64_t count, float* scratch) {
    switch (job.dtype) {
        case DType::float32:
            return attend<float>(job, image, head, first, count, scratch);
        case DType::bfloat16:
            return attend<BFloat16>(job, image, head, first, count, scratch);
        case DType::float16:
            return attend<Float16>(job, image, head, first, count, scratch);
    }
}

}  // namespace
}  // namespace msdd_fast
