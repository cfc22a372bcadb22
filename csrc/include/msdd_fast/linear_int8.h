// Rows times a packed weight matrix in 8 bits on the CPU: rows are rounded with a scale each, columns of the weight
// too.
#pragma once

#include <cstdint>
#include <string>

#include "msdd_fast/linear.h"
#include "msdd_fast/operand.h"

namespace msdd_fast {

// Rounded rows are bytes about QUANTIZED_ZERO; those of a row are a multiple of QUANTIZED_DEPTH in number, the last
// ones of any value.
constexpr int QUANTIZED_LEVELS = 127, QUANTIZED_ZERO = 128;
constexpr std::int64_t QUANTIZED_DEPTH = 64;

struct QuantizedRows {
    const std::uint8_t* values;
    std::int64_t stride;  // bytes from one row to the next
    const float* scales;  // of each row
};

// values = round(x / scale) + QUANTIZED_ZERO with scale = max |x| / QUANTIZED_LEVELS of each row, ties to even. A row
// of zeros gives zeros. Non-finite numbers give a scale that is not finite. Each row of `values` gets `stride` bytes.
void quantize_rows(std::uint8_t* values, std::int64_t stride, float* scales, const Rows& x, std::int64_t rows,
                   std::int64_t width, int threads);

// "amx" or "avx512vnni" where the machine has them, else "plain", which is slow. Tests also use "plain_amx".
std::string linear_int8_level();

// Number of 32-bit words of a packed weight.
std::int64_t linear_int8_packed_words(const LinearShape& shape, const std::string& level);

// Rounds and packs the rows of `weight`, `stride` elements apart, into `packed`, which is aligned to 64 bytes.
void linear_int8_pack(void* packed, const Operand& weight, std::int64_t stride, const LinearShape& shape,
                      const std::string& level, int threads);

// As `linear`, of rounded rows and weights: the sums of products are exact, what follows is in float32. |in| is at most
// 65536, so that no sum overflows.
void linear_int8(void* out, DType out_dtype, std::int64_t out_stride, const QuantizedRows& x, std::int64_t rows,
                 const void* packed, const Operand& bias, const LinearShape& shape, const std::string& level,
                 int threads);

}  // namespace msdd_fast
