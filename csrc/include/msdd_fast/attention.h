// Softmax attention on the CPU.
#pragma once

#include <cstdint>
#include <string>

#include "msdd_fast/operand.h"

namespace msdd_fast {

struct AttentionShape {
    std::int64_t batch, queries, keys, heads, head_size;
};

constexpr std::int64_t MAX_HEAD_SIZE = 128;

// The best of these that this machine can run: "avx512bf16", "avx512", "avx2", "plain". There is also "plain_bf16",
// which does what "avx512bf16" does, for tests.
std::string attention_level();

// out = softmax(q k^T / sqrt(head size)) v, plus `accumulate` where it is given (it may be `out`). All of one dtype,
// float32 inside, rounded once; but that the bf16 levels round the weights of bfloat16 attention, as SDPA does. `out`
// must not overlap q, k or v.
//
// `level` names the code to run, for tests; empty means attention_level(). Neither the number of threads nor the other
// images and heads change a bit of the result. Allocates some 0.4 MB a thread, whatever the shape, and keeps it.
// Throws std::invalid_argument on negative sizes, no keys, a head size that is not a multiple of 16 up to 128,
// threads < 1 or a level that cannot run here.
void attention(HeadsView out, HeadsView q, HeadsView k, HeadsView v, HeadsView accumulate, DType dtype,
               const AttentionShape& shape, const std::string& level, int threads);

}  // namespace msdd_fast
