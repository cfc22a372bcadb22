// Pixels of an image as bytes (docs/spec.md#quantise-pixels).
#pragma once

#include <cstdint>

#include "msdd_fast/detail/bits.h"

namespace msdd_fast {

// Type of an image's pixels. uint8 is floor(clamp(127.5 x + 128, 0, 255)), and 0 for NaN.
enum class PixelType : int { float32 = 0, bfloat16 = 1, float16 = 2, uint8 = 3 };

MSDD_INLINE std::uint8_t to_byte(float x) {
    float value = x * 127.5f + 128.0f;
    value = value > 0.0f ? value : 0.0f;  // NaN, too
    value = value < 255.0f ? value : 255.0f;
    return static_cast<std::uint8_t>(static_cast<std::int32_t>(value));
}

}  // namespace msdd_fast
