// Element types of tensors and their conversions to and from float32.
//
// Plain integer arithmetic, the same instructions for every value: any vector unit can do it, and no element type of
// the compiler's is needed (gcc 12 has no _Float16 in C++). Arrays of float16 take the F16C instructions where the
// machine has them. The bits depend neither on that nor on the SIMD level. A NaN keeps its sign and the bits there is
// room for, and is quiet after narrowing.
#pragma once

#include <cstdint>

#include "msdd_fast/detail/bits.h"

namespace msdd_fast {

enum class DType : int { float32 = 0, bfloat16 = 1, float16 = 2 };

// Bytes of an element.
constexpr int size_of(DType dtype) { return dtype == DType::float32 ? 4 : 2; }

struct BFloat16 {
    std::uint16_t bits;
};

struct Float16 {
    std::uint16_t bits;
};

MSDD_INLINE float to_float(float value) { return value; }

MSDD_INLINE float to_float(BFloat16 value) {
    return detail::as_float(static_cast<std::int32_t>(static_cast<std::uint32_t>(value.bits) << 16));
}

MSDD_INLINE float to_float(Float16 value) {
    const std::uint32_t magnitude = value.bits & 0x7FFFu;
    // Normal: shift the exponent's bias by multiplying, which leaves infinity and NaN what they are.
    const float normal = detail::as_float(static_cast<std::int32_t>((magnitude << 13) + (224u << 23))) * 0x1p-112f;
    // Subnormal (and zero): the mantissa counts units of 2^-24, which are the last bits of a float in [0.5, 1).
    const float subnormal = detail::as_float(static_cast<std::int32_t>(magnitude | (126u << 23))) - 0.5f;
    const std::int32_t bits = magnitude < 0x400u ? detail::as_int(subnormal) : detail::as_int(normal);
    return detail::as_float(bits | static_cast<std::int32_t>((value.bits & 0x8000u) << 16));
}

namespace detail {

// condition ? yes : no, by mask. From the plain choice gcc makes narrower, slower vectors.
MSDD_INLINE std::uint32_t pick(bool condition, std::uint32_t yes, std::uint32_t no) {
    const std::uint32_t mask = condition ? ~0u : 0u;
    return (yes & mask) | (no & ~mask);
}

}  // namespace detail

// Rounded to nearest, ties to even.
template <class T>
T from_float(float value);

template <>
MSDD_INLINE float from_float<float>(float value) {
    return value;
}

template <>
MSDD_INLINE BFloat16 from_float<BFloat16>(float value) {
    const auto bits = static_cast<std::uint32_t>(detail::as_int(value));
    const std::uint32_t rounded = bits + 0x7FFFu + ((bits >> 16) & 1u);
    return {static_cast<std::uint16_t>(detail::pick(value != value, bits | 0x400000u, rounded) >> 16)};
}

template <>
MSDD_INLINE Float16 from_float<Float16>(float value) {
    const auto bits = static_cast<std::uint32_t>(detail::as_int(value));
    const auto magnitude = static_cast<std::int32_t>(bits & 0x7FFFFFFFu);
    // Normal: change of bias and rounding in one addition; a carry out of the mantissa raises the exponent. All from
    // 2^16 on is infinity; what lies just below is rounded to it.
    const auto limited = static_cast<std::uint32_t>(magnitude < (143 << 23) ? magnitude : 143 << 23);
    const std::uint32_t normal = (limited - (112u << 23) + 0xFFFu + ((limited >> 13) & 1u)) >> 13;
    // Subnormal: the addition of 0.5 makes the unit in the last place 2^-24 and rounds.
    const float shifted = detail::as_float(magnitude) + 0.5f;
    const std::uint32_t subnormal = static_cast<std::uint32_t>(detail::as_int(shifted)) - (126u << 23);
    const std::uint32_t number = detail::pick(magnitude < (113 << 23), subnormal, normal);
    const std::uint32_t payload = detail::pick(value != value, 0x200u | ((bits >> 13) & 0x3FFu), 0u);
    return {static_cast<std::uint16_t>(number | payload | ((bits >> 16) & 0x8000u))};
}

// Arrays of one type to another. Loops of their own: mixed with arithmetic, the compiler vectorises them badly.
template <class T>
MSDD_INLINE void widen(const T* __restrict source, std::int64_t count, float* __restrict target) {
    for (std::int64_t i = 0; i < count; ++i) target[i] = to_float(source[i]);
}

template <class T>
MSDD_INLINE void narrow(const float* __restrict source, std::int64_t count, T* __restrict target) {
    for (std::int64_t i = 0; i < count; ++i) target[i] = from_float<T>(source[i]);
}

// In csrc/cpu/runtime/dtype.cpp; a call each, so best with some tens of elements or more.
void widen(const Float16* source, std::int64_t count, float* target);
void narrow(const float* source, std::int64_t count, Float16* target);

}  // namespace msdd_fast
