#include "msdd_fast/qk_norm_rope.h"

#include <algorithm>
#include <cmath>

#include "msdd_fast/check.h"
#include "msdd_fast/detail/floats.h"
#include "msdd_fast/detail/layer_norm.h"
#include "msdd_fast/detail/parallel.h"
#include "msdd_fast/detail/simd.h"

namespace msdd_fast {

constexpr int HEADS_CHUNK = 2048;                       // elements widened at a time: both buffers fit in L1
constexpr std::int64_t HEADS_GRAIN_ELEMENTS = 1 << 14;  // about 0.02 ms

struct QkNormRope {
    void* out;
    Operand x;
    HeadsTables tables;
    HeadsShape shape;
};

// How a head is normalised: (x - mean) * factor.
struct Statistics {
    float mean[HEADS_CHUNK / 2], factor[HEADS_CHUNK / 2];
};

// Of `count` heads of `d` elements. In loops of their own: the chains of sums, root and quotient of many heads overlap.
MSDD_INLINE void statistics_of(const float* x, std::int64_t count, int d, bool rms, float eps, Statistics& of) {
    for (std::int64_t i = 0; i < count; ++i) {
        const Squares s =
            rms ? Squares{0.0f, detail::squares_about<16>(x + i * d, d, 0.0f)} : centred_squares<16>(x + i * d, d);
        of.mean[i] = s.mean;
        of.factor[i] = s.sum;
    }
    for (std::int64_t i = 0; i < count; ++i)
        of.factor[i] = 1.0f / std::sqrt(of.factor[i] / static_cast<float>(d) + eps);
}

// D, or `size` where D is 0.
template <int D>
MSDD_INLINE void head(const float* x, int size, float mean, float factor, const float* weight, const float* bias,
                      const float* cos, const float* sin, float* __restrict out) {
    const int d = D == 0 ? size : D;
    alignas(64) float y[D == 0 ? MAX_ROPE_HEAD_DIM : D];
    if (bias == nullptr) {
        for (int i = 0; i < d; ++i) y[i] = x[i] * factor * weight[i];
    } else {
        for (int i = 0; i < d; ++i) y[i] = (x[i] - mean) * factor * weight[i] + bias[i];
    }
    for (int i = 0; i < d / 2; ++i) {
        const float even = y[2 * i], odd = y[2 * i + 1];
        out[2 * i] = sin == nullptr ? even * cos[i] : even * cos[i] - odd * sin[i];
        out[2 * i + 1] = sin == nullptr ? odd * cos[i] : even * sin[i] + odd * cos[i];
    }
}

// Tokens [begin, end) in the memory order of the output.
template <int D>
MSDD_INLINE void tokens_of(const QkNormRope& job, std::int64_t begin, std::int64_t end) {
    alignas(64) float in[HEADS_CHUNK], results[HEADS_CHUNK];
    Statistics statistics;
    const HeadsShape& s = job.shape;
    const std::int64_t d = D == 0 ? s.head_dim : D, chunk = HEADS_CHUNK / d * d;
    const std::int64_t per_token = s.parts * s.heads * d;
    for (std::int64_t t = begin; t < end; ++t) {
        const std::int64_t token = s.token_major ? t / s.batch : t % s.tokens;
        const std::int64_t image = s.token_major ? t % s.batch : t / s.tokens;
        const std::int64_t from = image * s.stride_batch + token * s.stride_token, to = t * per_token;
        const std::int64_t entry = token < s.split ? 0 : s.parts * d;
        const float* cos = job.tables.cos + token * (d / 2);
        const float* sin = job.tables.sin == nullptr ? nullptr : job.tables.sin + token * (d / 2);
        for (std::int64_t at = 0; at < per_token; at += chunk) {
            const std::int64_t count = std::min(chunk, per_token - at);
            const float* x = floats(job.x, from + at, count, in);
            float* out = place(job.out, job.x.dtype, to + at, results);
            const bool rms = job.tables.bias == nullptr;
            statistics_of(x, count / d, static_cast<int>(d), rms, s.eps, statistics);
            for (std::int64_t i = 0; i < count / d; ++i) {
                const std::int64_t part = entry + (at / d + i) / s.heads * d;
                const float* bias = rms ? nullptr : job.tables.bias + part;
                head<D>(x + i * d, s.head_dim, statistics.mean[i], statistics.factor[i], job.tables.weight + part, bias,
                        cos, sin, out + i * d);
            }
            store(out, count, job.out, job.x.dtype, to + at);
        }
    }
}

MSDD_SIMD_CLONES void qk_norm_rope_tokens(const QkNormRope& job, std::int64_t begin, std::int64_t end) {
    switch (job.shape.head_dim) {
        case 16:
            return tokens_of<16>(job, begin, end);
        case 32:
            return tokens_of<32>(job, begin, end);
        case 64:
            return tokens_of<64>(job, begin, end);
        case 72:
            return tokens_of<72>(job, begin, end);
        case 128:
            return tokens_of<128>(job, begin, end);
        default:
            return tokens_of<0>(job, begin, end);
    }
}

void qk_norm_rope(void* out, const void* x, DType dtype, const HeadsTables& tables, const HeadsShape& shape,
                  int threads) {
    const int d = shape.head_dim;
    expect(shape.batch >= 0 && shape.tokens >= 0 && shape.parts >= 0 && shape.heads >= 0, "sizes must not be negative");
    expect(d >= 2 && d <= MAX_ROPE_HEAD_DIM && d % 2 == 0,
           "head_dim must be even and at most " + std::to_string(MAX_ROPE_HEAD_DIM) + ", got " + std::to_string(d));
    expect_threads(threads);
    const std::int64_t per_token = shape.parts * shape.heads * d;
    if (shape.batch * shape.tokens * per_token == 0) return;
    const QkNormRope job{out, {x, dtype}, tables, shape};
    parallel_for(shape.batch * shape.tokens, std::max<std::int64_t>(1, HEADS_GRAIN_ELEMENTS / per_token), threads,
                 [&](std::int64_t begin, std::int64_t end) { qk_norm_rope_tokens(job, begin, end); });
}

}  // namespace msdd_fast
