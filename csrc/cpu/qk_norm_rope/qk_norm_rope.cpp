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

class Chunk {
  public:
    MSDD_INLINE Chunk(const QkNormRope& job, std::int64_t at)
        : job_(job), at_(at), out_(place(job.out, job.x.dtype, at, buffer_)) {}

    template <int D>
    MSDD_INLINE void write(std::int64_t at, const Head& head, const Angles& angles) {
        const int d = D == 0 ? job_.shape.head_dim : D;
        alignas(64) float y[D == 0 ? MAX_ROPE_HEAD_DIM : D];
        const auto& [x, mean, factor, weight, bias] = head;
        const auto& [cos, sin] = angles;
        if (bias == nullptr) {
            for (int i = 0; i < d; ++i) y[i] = x[i] * factor * weight[i];
        } else {
            for (int i = 0; i < d; ++i) y[i] = (x[i] - mean) * factor * weight[i] + bias[i];
        }
        float* __restrict out = out_ + at;
        for (int i = 0; i < d / 2; ++i) {
            const float even = y[2 * i], odd = y[2 * i + 1];
            out[2 * i] = sin == nullptr ? even * cos[i] : even * cos[i] - odd * sin[i];
            out[2 * i + 1] = sin == nullptr ? odd * cos[i] : even * sin[i] + odd * cos[i];
        }
    }

    MSDD_INLINE void finish(std::int64_t count) { store(out_, count, job_.out, job_.x.dtype, at_); }

  private:
    alignas(64) float buffer_[HEADS_CHUNK];
    const QkNormRope& job_;
    std::int64_t at_;
    float* out_;
};

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
