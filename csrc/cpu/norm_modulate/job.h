// What the code of each level is given.
#pragma once

#include "msdd_fast/detail/levels.h"
#include "msdd_fast/norm_modulate.h"

namespace msdd_fast {

struct NormModulate {
    void *h, *x_new;
    const void* x;
    DType dtype;
    Operand y;
    Table gate, shift, scale, rms_weight;
    NormShape shape;
};

#ifdef MSDD_X86_LEVELS
// Rows [begin, end) of x and y in bfloat16, with the bits of the code for any machine.
void norm_modulate_rows_avx512bf16(const NormModulate& job, std::int64_t begin, std::int64_t end);
#endif

}  // namespace msdd_fast
