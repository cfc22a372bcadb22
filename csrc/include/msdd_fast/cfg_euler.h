// Guidance and Euler step on the CPU, together or alone.
#pragma once

#include <cstdint>

#include "msdd_fast/operand.h"

namespace msdd_fast {

// v = v_cond, or v_uncond + scale * (v_cond - v_uncond) if v_uncond is given; out = v, or x + dt * v if x is given.
// All of `count` elements in one memory order, float32 inside, rounded once to `out_dtype`. `out` must not overlap.
// Throws std::invalid_argument on count < 0, threads < 1 or a missing v_cond.
void cfg_euler(void* out, DType out_dtype, Operand x, Operand v_cond, Operand v_uncond, std::int64_t count, float scale,
               float dt, int threads);

}  // namespace msdd_fast
