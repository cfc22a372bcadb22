// Classifier-free guidance and Euler step on the CPU, together or alone (docs/spec.md#cfg, docs/spec.md#sampler).
#pragma once

#include <cstdint>

#include "msdd_fast/operand.h"

namespace msdd_fast {

// v = v_cond, or v_uncond + scale * (v_cond - v_uncond) if v_uncond is given; out = v, or x + dt * v if x is given.
// All of `rows` x `columns` elements, `out` contiguous and without overlap; float32 inside, rounded once to
// `out_dtype`. Throws std::invalid_argument on negative sizes, threads < 1 or a missing v_cond.
void cfg_euler(void* out, DType out_dtype, const Rows& x, const Rows& v_cond, const Rows& v_uncond, std::int64_t rows,
               std::int64_t columns, float scale, float dt, int threads);

}  // namespace msdd_fast
