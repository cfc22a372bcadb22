// A vectorisable exp: no table, no branch, no call.
#pragma once

#include "msdd_fast/detail/bits.h"

namespace msdd_fast {

// e^x to 1e-7 relative for x in [-87, 88]; below the smallest normal number's, infinity above 88.4. A NaN gives
// infinity. x = n ln 2 + r with |r| <= ln(2) / 2; a polynomial for e^r (Cephes), n goes into the exponent.
MSDD_INLINE float exp_float(float x) {
    x = x > -87.0f ? x : -87.0f;
    x = x < 89.0f ? x : 89.0f;
    const float shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: rounds to an integer, in the last bits
    const float n = shifted - 12582912.0f;
    const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;  // ln 2 in two parts, the first exact times n
    // Estrin's scheme: half the dependency chain of Horner's.
    const float r2 = r * r;
    const float high = (1.9875691500e-4f * r + 1.3981999507e-3f) * r2 + (8.3334519073e-3f * r + 4.1665795894e-2f);
    const float p = (high * r2 + (1.6666665459e-1f * r + 5.0000001201e-1f)) * r2 + (r + 1.0f);
    // The integer's last bits plus the bias; at n = 128 this is infinity.
    const std::int32_t exponent = (detail::as_int(shifted) - detail::as_int(12582912.0f) + 127) << 23;
    return p * detail::as_float(exponent);
}

}  // namespace msdd_fast
