// A line of queries lies across the lanes of the vectors, and so do the keys and values of the lines round it, features
// first: [feature][x]. The keys at one displacement are then the same line, read some elements further on, so all three
// steps, scores, softmax and the sum of the values, work on whole vectors of queries, and no score outside the window
// is ever calculated. Going down the image, each line of keys is widened and turned once and kept in a ring for as long
// as a query can see it.
#include "msdd_fast/window_attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "msdd_fast/check.h"
#include "msdd_fast/detail/exp.h"
#include "msdd_fast/detail/floats.h"
#include "msdd_fast/detail/parallel.h"
#include "msdd_fast/detail/scratch.h"
#include "msdd_fast/detail/simd.h"

namespace msdd_fast {

constexpr int WINDOW_LANES = 16;  // queries side by side
constexpr int DISPLACEMENTS = 5;  // scores of as many displacements at a time stay in registers
constexpr int FEATURES = 4;       // sums of as many features at a time
constexpr std::int64_t WINDOW_GRAIN_PRODUCTS = 500'000;

struct WindowAttention {
    HeadsView out, q, k, v;
    BiasTable table;
    DType dtype;
    WindowShape shape;
};

// Sizes of a thread's buffers, in floats.
struct WindowSizes {
    std::int64_t span;      // displacements along one axis, 2 window - 1
    std::int64_t spread;    // the same, padded to whole groups
    std::int64_t blocks;    // of queries in a line
    std::int64_t line;      // columns of a line of keys: the queries' and what the displacements reach beyond them
    std::int64_t features;  // padded to whole groups
    std::int64_t keys, queries, scores, bias, row;

    explicit WindowSizes(const WindowShape& s) {
        const auto whole = [](std::int64_t n, std::int64_t of) { return (n + of - 1) / of * of; };
        span = 2 * s.window - 1;
        spread = whole(span, DISPLACEMENTS);
        blocks = whole(s.width, WINDOW_LANES) / WINDOW_LANES;
        line = whole(blocks * WINDOW_LANES + spread, WINDOW_LANES);
        features = whole(s.head_size, FEATURES);
        keys = span * features * line;
        queries = features * WINDOW_LANES;
        scores = span * spread * WINDOW_LANES;
        bias = span * span;
        row = whole(s.head_size, WINDOW_LANES);
    }

    // Keys, values, queries and their sums, scores, and one widened row of a tensor and the bias of one head.
    std::int64_t floats() const { return (2 * keys + 2 * queries + scores + bias + row + 8 * 16) / 16 * 16; }
};

template <class T>
MSDD_INLINE T* token_of(const HeadsView& view, std::int64_t image, std::int64_t token, std::int64_t head) {
    return static_cast<T*>(view.data) + image * view.batch + token * view.token + head * view.head;
}

// `count` tokens from `first` on, turned: to[feature * stride + i].
template <class T>
MSDD_INLINE void turn(const HeadsView& view, std::int64_t image, std::int64_t head, std::int64_t first,
                      std::int64_t count, std::int64_t size, float factor, std::int64_t stride, float* row, float* to) {
    for (std::int64_t i = 0; i < count; ++i) {
        widen(token_of<T>(view, image, first + i, head), size, row);
        for (std::int64_t d = 0; d < size; ++d) to[d * stride + i] = row[d] * factor;
    }
}

// Eight floats, in one register or two: of arrays the compiler would keep the sums in memory.
using WindowVec = float __attribute__((vector_size(32)));
constexpr int VECS = WINDOW_LANES / 8;

MSDD_INLINE void load_vec(const float* from, WindowVec& to) { std::memcpy(&to, from, sizeof to); }
MSDD_INLINE void store_vec(const WindowVec& from, float* to) { std::memcpy(to, &from, sizeof from); }

// scores[j][lane] of DISPLACEMENTS neighbouring keys for each query of a block.
MSDD_INLINE void window_scores(const float* queries, const float* keys, std::int64_t line, std::int64_t size,
                               float* scores) {
    WindowVec sums[DISPLACEMENTS][VECS] = {}, query, key;
    for (std::int64_t d = 0; d < size; ++d)
#pragma GCC unroll 8
        for (int half = 0; half < VECS; ++half) {
            load_vec(queries + d * WINDOW_LANES + half * 8, query);
#pragma GCC unroll 8
            for (int j = 0; j < DISPLACEMENTS; ++j) {
                load_vec(keys + d * line + j + half * 8, key);
                sums[j][half] += query * key;
            }
        }
#pragma GCC unroll 8
    for (int j = 0; j < DISPLACEMENTS; ++j)
#pragma GCC unroll 8
        for (int half = 0; half < VECS; ++half) store_vec(sums[j][half], scores + j * WINDOW_LANES + half * 8);
}

// sums[d][lane] += weights[j][lane] * values[d][j + lane] for FEATURES features and all displacements j of a line.
MSDD_INLINE void window_sums(const float* weights, const float* values, std::int64_t line, std::int64_t span,
                             float* into) {
    WindowVec sums[FEATURES][VECS], weight, value;
#pragma GCC unroll 8
    for (int d = 0; d < FEATURES; ++d)
#pragma GCC unroll 8
        for (int half = 0; half < VECS; ++half) load_vec(into + d * WINDOW_LANES + half * 8, sums[d][half]);
    for (std::int64_t j = 0; j < span; ++j)
#pragma GCC unroll 8
        for (int half = 0; half < VECS; ++half) {
            load_vec(weights + j * WINDOW_LANES + half * 8, weight);
#pragma GCC unroll 8
            for (int d = 0; d < FEATURES; ++d) {
                load_vec(values + d * line + j + half * 8, value);
                sums[d][half] += weight * value;
            }
        }
#pragma GCC unroll 8
    for (int d = 0; d < FEATURES; ++d)
#pragma GCC unroll 8
        for (int half = 0; half < VECS; ++half) store_vec(sums[d][half], into + d * WINDOW_LANES + half * 8);
}

// Lines [begin, end) of queries, counted through all images and heads.
template <class T>
MSDD_INLINE void window_lines(const WindowAttention& job, std::int64_t begin, std::int64_t end, float* scratch) {
    const auto [batch, height, width, heads, size, window] = job.shape;
    const WindowSizes sizes(job.shape);
    const std::int64_t span = sizes.span, line = sizes.line, reach = window - 1;
    float* const keys = scratch;
    float* const values = keys + sizes.keys;
    float* const queries = values + sizes.keys;
    float* const sums = queries + sizes.queries;
    float* const scores = sums + sizes.queries;
    float* const row = scores + sizes.scores;
    float* const bias = row + sizes.row;
    const auto factor = static_cast<float>(1.0 / std::sqrt(static_cast<double>(size)));
    std::fill(keys, keys + 2 * sizes.keys, 0.0f);  // what lies beyond the image and the features stays so
    std::fill(queries, queries + sizes.queries, 0.0f);
    std::int64_t known = -1, packed = 0;  // image and head at hand, lines of their keys up to which are packed
    for (std::int64_t i = begin; i < end; ++i) {
        const std::int64_t which = i / height, y = i % height, image = which / heads, head = which % heads;
        const std::int64_t top = std::max<std::int64_t>(0, y - reach), bottom = std::min(height, y + window);
        if (which != known) {
            known = which;
            packed = top;
            for (std::int64_t dy = 0; dy < span; ++dy)
                for (std::int64_t dx = 0; dx < span; ++dx) {
                    float buffer[1];
                    const BiasTable& t = job.table;
                    bias[dy * span + dx] = *floats(t.values, dy * t.row + dx * t.column + head * t.head, 1, buffer);
                }
        }
        for (; packed < bottom; ++packed) {
            const std::int64_t at = packed % span * sizes.features * line + reach;
            turn<T>(job.k, image, head, packed * width, width, size, 1.0f, line, row, keys + at);
            turn<T>(job.v, image, head, packed * width, width, size, 1.0f, line, row, values + at);
        }
        for (std::int64_t block = 0; block < sizes.blocks; ++block) {
            const std::int64_t first = block * WINDOW_LANES,
                               count = std::min<std::int64_t>(WINDOW_LANES, width - first);
            turn<T>(job.q, image, head, y * width + first, count, size, factor, WINDOW_LANES, row, queries);
            float highest[WINDOW_LANES], total[WINDOW_LANES] = {};
            std::fill(highest, highest + WINDOW_LANES, -std::numeric_limits<float>::infinity());
            float* these = scores;
            for (std::int64_t ky = top; ky < bottom; ++ky, these += sizes.spread * WINDOW_LANES) {
                const float* const line_keys = keys + ky % span * sizes.features * line + first;
                for (std::int64_t j = 0; j < sizes.spread; j += DISPLACEMENTS)
                    window_scores(queries, line_keys + j, line, size, these + j * WINDOW_LANES);
                for (std::int64_t j = 0; j < span; ++j) {
                    // Lane x looks at column first + x + j - reach, so qx - kx + window - 1 is 2 (window - 1) - j.
                    const float b = bias[(y - ky + reach) * span + 2 * reach - j];
                    const std::int64_t left = reach - j - first, right = width + left;  // lanes whose key exists
                    for (int x = 0; x < WINDOW_LANES; ++x) {
                        float& score = these[j * WINDOW_LANES + x];
                        score = x >= left && x < right ? score + b : -std::numeric_limits<float>::infinity();
                        highest[x] = highest[x] > score ? highest[x] : score;
                    }
                }
            }
            these = scores;
            for (std::int64_t ky = top; ky < bottom; ++ky, these += sizes.spread * WINDOW_LANES)
                for (std::int64_t j = 0; j < span; ++j)
                    for (int x = 0; x < WINDOW_LANES; ++x) {
                        const float weight = exp_float(these[j * WINDOW_LANES + x] - highest[x]);
                        these[j * WINDOW_LANES + x] = weight;
                        total[x] += weight;
                    }
            std::fill(sums, sums + sizes.queries, 0.0f);
            these = scores;
            for (std::int64_t ky = top; ky < bottom; ++ky, these += sizes.spread * WINDOW_LANES) {
                const float* const line_values = values + ky % span * sizes.features * line + first;
                for (std::int64_t d = 0; d < size; d += FEATURES)
                    window_sums(these, line_values + d * line, line, span, sums + d * WINDOW_LANES);
            }
            for (std::int64_t x = 0; x < count; ++x) {
                const float inverse = 1.0f / total[x];
                for (std::int64_t d = 0; d < size; ++d) row[d] = sums[d * WINDOW_LANES + x] * inverse;
                narrow(row, size, token_of<T>(job.out, image, y * width + first + x, head));
            }
        }
    }
}

MSDD_SIMD_CLONES void window_any_lines(const WindowAttention& job, std::int64_t begin, std::int64_t end,
                                       float* scratch) {
    switch (job.dtype) {
        case DType::float32:
            return window_lines<float>(job, begin, end, scratch);
        case DType::bfloat16:
            return window_lines<BFloat16>(job, begin, end, scratch);
        case DType::float16:
            return window_lines<Float16>(job, begin, end, scratch);
    }
}

void window_attention(HeadsView out, HeadsView q, HeadsView k, HeadsView v, const BiasTable& table, DType dtype,
                      const WindowShape& shape, int threads) {
    const auto& [batch, height, width, heads, size, window] = shape;
    expect(batch >= 0 && height >= 0 && width >= 0 && heads >= 0 && size >= 0, "sizes must not be negative");
    expect(window >= 1, "window must be at least 1, got " + std::to_string(window));
    expect_threads(threads);
    const std::int64_t lines = batch * heads * height;
    if (lines == 0 || width == 0 || size == 0) return;
    const WindowAttention job{out, q, k, v, table, dtype, shape};
    const std::int64_t seen = std::min(height, 2 * window - 1) * (2 * window - 1);
    const std::int64_t products = 2 * lines * width * seen * size;
    const std::int64_t parts = std::min<std::int64_t>(lines, threads_for(products, WINDOW_GRAIN_PRODUCTS, threads));
    const std::int64_t floats = WindowSizes(shape).floats();
    float* const scratch = scratch_of(parts * floats);
    parallel_for(parts, 1, threads, [&](std::int64_t first, std::int64_t last) {
        for (std::int64_t part = first; part < last; ++part)
            window_any_lines(job, lines * part / parts, lines * (part + 1) / parts, scratch + part * floats);
    });
}

}  // namespace msdd_fast
