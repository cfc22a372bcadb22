// The exact GELU, by a vectorisable erfc: no table, no branch, no call.
#pragma once

#include "msdd_fast/detail/exp.h"

namespace msdd_fast {

// erfc(x) for x >= 0, to 4e-7 absolute and, from x = 1 on, 1e-7: t e^(-x^2) P(t) with t = 1 / (1 + 0.453125 x), P our
// own fit (minimax in the absolute error, 1.6e-9 before rounding).
MSDD_INLINE float erfc_positive(float x) {
    const float t = 1.0f / (1.0f + 0.453125f * x);
    float p = 0.09212916257810803f;
    p = p * t - 0.48286419267321523f;
    p = p * t + 0.8157808722227818f;
    p = p * t - 0.3316113977204868f;
    p = p * t + 0.4368370192139872f;
    p = p * t + 0.2097992203294637f;
    p = p * t + 0.2599293175990584f;
    return t * p * exp_float(-x * x);
}

// x (1 + erf(x / sqrt(2))) / 2.
MSDD_INLINE float gelu(float x) {
    const float magnitude = x < 0.0f ? -x : x;
    const float half = 0.5f * erfc_positive(magnitude * 0.70710678f);
    return x * (x < 0.0f ? half : 1.0f - half);
}

}  // namespace msdd_fast
