// Tokens of qk_norm_rope. Each level's file defines these and then includes this:
//
//   MSDD_SIMD    of functions that use the level's instructions: attribute and `inline`
//   Angles       a token's cosines and sines as the level reads them, made of (cos, sin, head size); sin may be null
//   Chunk        of the output from element `at` on, made of (job, at). write<D>(i, head, angles) puts a Head (job.h),
//                rotated, at its element i; D is the head's size, or 0 for that of the job. finish(count) comes last
//
// No include guard: each level includes this exactly once.

#include <algorithm>
#include <cmath>

#include "job.h"
#include "msdd_fast/detail/floats.h"
#include "msdd_fast/detail/layer_norm.h"

namespace msdd_fast {
namespace {

// How a head is normalised: (x - mean) * factor.
struct Statistics {
    float mean[HEADS_CHUNK / 2], factor[HEADS_CHUNK / 2];
};

// Of `count` heads of `d` elements. In loops of their own: the chains of sums, root and quotient of many heads overlap.
MSDD_SIMD void statistics_of(const float* x, std::int64_t count, int d, bool rms, float eps, Statistics& of) {
    for (std::int64_t i = 0; i < count; ++i) {
        const Squares s =
            rms ? Squares{0.0f, detail::squares_about<16>(x + i * d, d, 0.0f)} : centred_squares<16>(x + i * d, d);
        of.mean[i] = s.mean;
        of.factor[i] = s.sum;
    }
    for (std::int64_t i = 0; i < count; ++i)
        of.factor[i] = 1.0f / std::sqrt(of.factor[i] / static_cast<float>(d) + eps);
}

// Tokens [begin, end) in the memory order of the output.
template <int D>
MSDD_SIMD void tokens_of(const QkNormRope& job, std::int64_t begin, std::int64_t end) {
    alignas(64) float in[HEADS_CHUNK];
    Statistics statistics;
    const HeadsShape& s = job.shape;
    const std::int64_t d = D == 0 ? s.head_dim : D, chunk = HEADS_CHUNK / d * d;
    const std::int64_t per_token = s.parts * s.heads * d;
    const bool rms = job.tables.bias == nullptr;
    for (std::int64_t t = begin; t < end; ++t) {
        const std::int64_t token = s.token_major ? t / s.batch : t % s.tokens;
        const std::int64_t image = s.token_major ? t % s.batch : t / s.tokens;
        const std::int64_t from = image * s.stride_batch + token * s.stride_token, to = t * per_token;
        const std::int64_t entry = token < s.split ? 0 : s.parts * d;
        const float* const sin = job.tables.sin;
        const Angles angles(job.tables.cos + token * (d / 2), sin == nullptr ? nullptr : sin + token * (d / 2), d);
        for (std::int64_t at = 0; at < per_token; at += chunk) {
            const std::int64_t count = std::min(chunk, per_token - at);
            const float* x = floats(job.x, from + at, count, in);
            statistics_of(x, count / d, static_cast<int>(d), rms, s.eps, statistics);
            Chunk out(job, to + at);
            for (std::int64_t i = 0; i < count / d; ++i) {
                const std::int64_t part = entry + (at / d + i) / s.heads * d;
                const float* bias = rms ? nullptr : job.tables.bias + part;
                out.template write<D>(
                    i * d, {x + i * d, statistics.mean[i], statistics.factor[i], job.tables.weight + part, bias},
                    angles);
            }
            out.finish(count);
        }
    }
}

MSDD_SIMD void tokens_of_level(const QkNormRope& job, std::int64_t begin, std::int64_t end) {
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

}  // namespace
}  // namespace msdd_fast
