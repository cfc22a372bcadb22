// A gate that depends on the noise level, the sum that it makes, and RMSNorm and adaLN of it, on the CPU.
#pragma once

#include <cstdint>

#include "msdd_fast/norm_modulate.h"

namespace msdd_fast {

// One value per row, or one for each of its elements if `wide`; `stride` elements from row to row.
struct Logits {
    Operand values;
    std::int64_t stride = 0;
    bool wide = false;
};

struct SigmaGate {
    Operand x, y;          // `rows` x `width`, contiguous
    Logits offset, logit;  // logit is absent if weight is given
    Operand weight;        // (width,), or absent
    Table shift, scale;    // absent: no norm
    Operand rms_weight;    // (width,)
};

// x_new = x + sigmoid(logit + offset) * y, rounded to x's dtype, where logit is given or the row's product with weight;
// h = rms_weight * x_new / sqrt(mean square + eps) * (1 + scale) + shift, of the same dtype, unless shift is absent.
// float32 inside, each result rounded once. Nothing may overlap.
// Throws std::invalid_argument on negative sizes, width above MAX_NORM_WIDTH, run or groups < 1, threads < 1, or a
// missing operand.
void sigma_gate(void* x_new, void* h, const SigmaGate& operands, const NormShape& shape, int threads);

}  // namespace msdd_fast
