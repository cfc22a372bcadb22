// Operands of any element type read and written as float32.
#pragma once

#include <cstdint>

#include "msdd_fast/detail/bits.h"
#include "msdd_fast/operand.h"

namespace msdd_fast {

// Elements [begin, begin + count) as float32: in place if they are, else in `buffer`; null if there is no operand.
MSDD_INLINE const float* floats(const Operand& operand, std::int64_t begin, std::int64_t count, float* buffer) {
    if (operand.data == nullptr) return nullptr;
    switch (operand.dtype) {
        case DType::bfloat16:
            widen(static_cast<const BFloat16*>(operand.data) + begin, count, buffer);
            return buffer;
        case DType::float16:
            widen(static_cast<const Float16*>(operand.data) + begin, count, buffer);
            return buffer;
        case DType::float32:
            break;
    }
    return static_cast<const float*>(operand.data) + begin;
}

MSDD_INLINE float element(const Operand& operand, std::int64_t at) {
    float buffer[1];
    return *floats(operand, at, 1, buffer);
}

// Where to compute `count` float32 values that go to `target` from `begin` on: there if it holds float32, else
// `buffer`, from which `store` rounds them.
MSDD_INLINE float* place(void* target, DType dtype, std::int64_t begin, float* buffer) {
    return dtype == DType::float32 ? static_cast<float*>(target) + begin : buffer;
}

MSDD_INLINE void store(const float* values, std::int64_t count, void* target, DType dtype, std::int64_t begin) {
    if (dtype == DType::bfloat16) narrow(values, count, static_cast<BFloat16*>(target) + begin);
    if (dtype == DType::float16) narrow(values, count, static_cast<Float16*>(target) + begin);
}

}  // namespace msdd_fast
