"""x + dt * (v_uncond + scale * (v_cond - v_uncond)) in one pass: three reads, one write (ops/cfg_euler.py)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from msdd_fast.kernels._elementwise import BLOCK, NUM_WARPS, flat_grid


@triton.jit
def cfg_euler_kernel(
    p_x,  # (n,)
    p_cond,  # (n,)
    p_uncond,  # (n,)
    p_scale,  # () fp32
    p_dt,  # () fp32
    p_out,  # (n,)
    n,
    BLOCK: tl.constexpr,
):
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = o < n
    b_x = tl.load(p_x + o, mask=m, other=0.0).to(tl.float32)  # [BLOCK]
    b_cond = tl.load(p_cond + o, mask=m, other=0.0).to(tl.float32)  # [BLOCK]
    b_uncond = tl.load(p_uncond + o, mask=m, other=0.0).to(tl.float32)  # [BLOCK]
    b_v = b_uncond + tl.load(p_scale) * (b_cond - b_uncond)
    tl.store(p_out + o, (b_x + tl.load(p_dt) * b_v).to(p_out.dtype.element_ty), mask=m)


def cfg_euler(x: Tensor, v_cond: Tensor, v_uncond: Tensor, scale: Tensor, dt: Tensor) -> Tensor:
    """Launch on tensors of one shape and memory order; returns x's dtype and memory order."""
    out = torch.empty_like(x)
    if out.numel() > 0:
        cfg_euler_kernel[flat_grid(x)](
            x, v_cond, v_uncond, scale, dt, out, x.numel(), BLOCK=BLOCK, num_warps=NUM_WARPS, enable_fp_fusion=True
        )
    return out
