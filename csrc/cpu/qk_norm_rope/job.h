// What the code of each level is given.
#pragma once

#include "msdd_fast/detail/levels.h"
#include "msdd_fast/qk_norm_rope.h"

namespace msdd_fast {

struct QkNormRope {
    void* out;
    Operand x;
    HeadsTables tables;
    HeadsShape shape;
};

constexpr int HEADS_CHUNK = 2048;  // elements of whole heads at a time: as float32 they fit in L1

// A head before its rotation: (x - mean) * factor * weight + bias, or x * factor * weight where bias is null.
struct Head {
    const float* x;
    float mean, factor;
    const float *weight, *bias;
};

#ifdef MSDD_X86_LEVELS
// Tokens [begin, end), in the memory order of the output, of bfloat16, with the bits of the code for any machine.
void qk_norm_rope_tokens_avx512bf16(const QkNormRope& job, std::int64_t begin, std::int64_t end);
#endif

}  // namespace msdd_fast
