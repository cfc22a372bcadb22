"""x + dt * v in one pass, fp32 inside: two reads, one write (see msdd_fast/ops/euler_step.py)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from msdd_fast.kernels._elementwise import BLOCK, NUM_WARPS, flat_grid


@triton.jit
def euler_step_kernel(
    p_x,  # (n,)
    p_v,  # (n,)
    p_dt,  # () fp32
    p_out,  # (n,)
    n,
    BLOCK: tl.constexpr,
):
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = o < n
    b_x = tl.load(p_x + o, mask=m, other=0.0).to(tl.float32)  # [BLOCK]
    b_v = tl.load(p_v + o, mask=m, other=0.0).to(tl.float32)  # [BLOCK]
    tl.store(p_out + o, (b_x + tl.load(p_dt) * b_v).to(p_out.dtype.element_ty), mask=m)


def euler_step(x: Tensor, v: Tensor, dt: Tensor) -> Tensor:
    """Launch on x and v of one shape and memory order; returns x's dtype and memory order."""
    out = torch.empty_like(x)
    if out.numel() > 0:
        euler_step_kernel[flat_grid(x)](
            x, v, dt, out, x.numel(), BLOCK=BLOCK, num_warps=NUM_WARPS, enable_fp_fusion=True
        )
    return out
