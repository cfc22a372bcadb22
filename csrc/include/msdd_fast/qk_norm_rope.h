// Per-head LayerNorm or RMSNorm and rotary position embedding on the CPU (docs/spec.md#qk-norm, docs/spec.md#rope).
#pragma once

#include <cstdint>

#include "msdd_fast/operand.h"

namespace msdd_fast {

constexpr int MAX_ROPE_HEAD_DIM = 128;

struct HeadsShape {
    std::int64_t batch, tokens, parts, heads;  // parts to normalise: q and k, or k alone
    int head_dim;                              // even, up to MAX_ROPE_HEAD_DIM
    std::int64_t stride_batch, stride_token;   // of the input; parts, heads and head_dim are contiguous
    bool token_major;    // memory order of the output: (tokens, batch, ...) or (batch, tokens, ...)
    std::int64_t split;  // tokens before it use entry 0 of the weights, the others entry 1
    float eps;
};

struct HeadsTables {
    const float *weight, *bias;  // (2 or 1, parts, head_dim): one entry only if `split` is at or past the end; bias
                                 // null: RMSNorm
    const float *cos, *sin;      // (tokens, head_dim / 2); sin null: scale by cos, do not rotate
};

// out = rope(layer_norm(x) * weight + bias), or rope(rms_norm(x) * weight), for every head, `out` dense, both of
// `dtype`; float32 inside, rounded once. A pair (even, odd) becomes (even cos - odd sin, even sin + odd cos). Throws
// std::invalid_argument on negative sizes, another head_dim or threads < 1.
void qk_norm_rope(void* out, const void* x, DType dtype, const HeadsTables& tables, const HeadsShape& shape,
                  int threads);

}  // namespace msdd_fast
