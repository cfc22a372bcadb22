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

// The first of "avx512bf16", "avx512", "avx2" and "plain" that this machine can run. Tests also use "plain_bf16", which
// emulates "avx512bf16".
std::string attention_level();

// out = softmax(q k^T / sqrt(head size)) v, plus `accumulate` where it is given (it may be `out`). All of one dtype,
// Computed in float32 and rounded once, except that the bf16 levels round the softmax weights to bfloat16, as SDPA
// does. `out` must not overlap q, k or v.
//
// `level` names the code to run, for tests; empty means attention_level(). Results are bitwise independent
// of the number of threads and of other images and heads. Keeps about 0.4 MB of scratch per thread, whatever the shape.
// Throws std::invalid_argument on negative sizes, no keys, a head size that is not in [1, 128],
// threads < 1 or a level that cannot run here.
void attention(HeadsView out, HeadsView q, HeadsView k, HeadsView v, HeadsView accumulate, DType dtype,
               const AttentionShape& shape, const std::string& level, int threads);

}  // namespace msdd_fast
