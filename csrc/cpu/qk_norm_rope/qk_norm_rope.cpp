#include "msdd_fast/qk_norm_rope.h"

#include <algorithm>

#include "job.h"
#include "msdd_fast/check.h"
#include "msdd_fast/detail/floats.h"
#include "msdd_fast/detail/parallel.h"
#include "msdd_fast/detail/simd.h"

#define MSDD_SIMD MSDD_INLINE

namespace msdd_fast {
namespace {

constexpr std::int64_t HEADS_GRAIN_ELEMENTS = 1 << 14;  // about 0.02 ms

// Of half a head's elements, one for each pair.
struct Angles {
    const float *cos, *sin;

    MSDD_INLINE Angles(const float* cosines, const float* sines, std::int64_t) : cos(cosines), sin(sines) {}
};

template <int D>
MSDD_SIMD void write_head(const QkNormRope& job, std::int64_t at, const Head& head, const Angles& angles) {
    const int d = D == 0 ? job.shape.head_dim : D;
    alignas(64) float y[D == 0 ? MAX_ROPE_HEAD_DIM : D], result[D == 0 ? MAX_ROPE_HEAD_DIM : D];
    if (head.bias == nullptr) {
        for (int i = 0; i < d; ++i) y[i] = head.x[i] * head.factor * head.weight[i];
    } else {
        for (int i = 0; i < d; ++i) y[i] = (head.x[i] - head.mean) * head.factor * head.weight[i] + head.bias[i];
    }
    float* __restrict out = place(job.out, job.x.dtype, at, result);
    for (int i = 0; i < d / 2; ++i) {
        const float even = y[2 * i], odd = y[2 * i + 1], cos = angles.cos[i];
        out[2 * i] = angles.sin == nullptr ? even * cos : even * cos - odd * angles.sin[i];
        out[2 * i + 1] = angles.sin == nullptr ? odd * cos : even * angles.sin[i] + odd * cos;
    }
    store(out, d, job.out, job.x.dtype, at);
}

}  // namespace
}  // namespace msdd_fast

#include "tokens.h"

namespace msdd_fast {

MSDD_SIMD_CLONES void qk_norm_rope_tokens(const QkNormRope& job, std::int64_t begin, std::int64_t end) {
    tokens_of_level(job, begin, end);
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
    auto* tokens = qk_norm_rope_tokens;
#ifdef MSDD_X86_LEVELS
    static const bool pairs = can_run("avx512bf16");
    if (pairs && dtype == DType::bfloat16) tokens = qk_norm_rope_tokens_avx512bf16;
#endif
    parallel_for(shape.batch * shape.tokens, std::max<std::int64_t>(1, HEADS_GRAIN_ELEMENTS / per_token), threads,
                 [&](std::int64_t begin, std::int64_t end) { tokens(job, begin, end); });
}

}  // namespace msdd_fast
