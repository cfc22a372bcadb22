"""Shared by the kernels at the end of a stage: the Euler step on patch rows."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def end_of_stage(
    p_x: tl.tensor,
    p_v: tl.tensor,
    p_uncond: tl.tensor,
    p_dt: tl.tensor,
    p_scale: tl.tensor,
    o_x: tl.tensor,
    o_v: tl.tensor,
    o_uncond: tl.tensor,
    m: tl.tensor,
    GUIDED: tl.constexpr,
) -> tl.tensor:
    """x + dt * v, or x + dt * (v_uncond + scale * (v - v_uncond)), fp32: offsets and mask of one shape."""
    b_x = tl.load(p_x + o_x, mask=m, other=0.0).to(tl.float32)
    b_v = tl.load(p_v + o_v, mask=m, other=0.0).to(tl.float32)
    if GUIDED:
        b_uncond = tl.load(p_uncond + o_uncond, mask=m, other=0.0).to(tl.float32)
        b_v = b_uncond + tl.load(p_scale) * (b_v - b_uncond)
    return b_x + tl.load(p_dt) * b_v


def widest_run(pixels: int, limit: int) -> int:
    """The largest power of two that divides ``pixels`` and is at most ``limit``."""
    return min(pixels & -pixels, limit)
