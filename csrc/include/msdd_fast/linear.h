// Rows times a packed weight matrix on the CPU.
#pragma once

#include <cstdint>
#include <string>

#include "msdd_fast/operand.h"

namespace msdd_fast {

// A weight (out, in) of this dtype. With `swiglu` it is [w1; w3], both (out / 2, in).
struct LinearShape {
    std::int64_t out, in;
    bool swiglu;
};

struct PackedSize {
    std::int64_t elements;
    DType dtype;
};

// The first of "amx", "avx512bf16", "avx512", "avx2" and "plain" that this machine can run. Tests also use "plain_bf16"
// and "plain_amx", which emulate "avx512bf16" and "amx". The levels named after bfloat16 multiply other dtypes as
// "avx512" and "plain" do.
std::string linear_level();

// Size and dtype of a weight packed for `level`: bfloat16 where the level multiplies pairs of it, else float32.
PackedSize linear_packed_size(const LinearShape& shape, DType dtype, const std::string& level);

// Packs the rows of `weight`, `stride` elements apart, into `packed`, which is aligned to 64 bytes.
void linear_pack(void* packed, const Operand& weight, std::int64_t stride, const LinearShape& shape,
                 const std::string& level, int threads);

// out = x W^T + bias, or silu(x W1^T + b1) * (x W3^T + b3) with `swiglu`, for rows of x in the dtype that the weight
// had and a bias (out,) of any dtype, or none. Summed in float32 in the order of `in`, one rounding to `out_dtype`.
// `out` must not overlap x; rows of x and of out may be any distance apart.
//
// `level` names the code to run, for tests; empty means linear_level(). Bits of a row depend neither on the number of
// threads nor on the other rows. Throws std::invalid_argument on negative sizes, an odd `out` with `swiglu`,
// threads < 1 or a level that cannot run here.
void linear(void* out, DType out_dtype, std::int64_t out_stride, const Rows& x, std::int64_t rows, const void* packed,
            const Operand& bias, const LinearShape& shape, const std::string& level, int threads);

}  // namespace msdd_fast
