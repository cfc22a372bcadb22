"""x + dt * (v_uncond + scale * (v_cond - v_uncond)) in one pass: three reads, one write (ops/cfg_euler.py)."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from msdd_fast.kernels._aot import AotCase, float32
from msdd_fast.kernels._rows import BLOCK, NUM_WARPS, launch_for, result_like, row_and_columns


@triton.jit
def cfg_euler_kernel(
    p_x: tl.tensor,  # (rows, columns)
    p_cond: tl.tensor,  # (rows, columns)
    p_uncond: tl.tensor,  # (rows, columns)
    p_scale: tl.tensor,  # () fp32
    p_dt: tl.tensor,  # () fp32
    p_out: tl.tensor,  # (rows, columns), contiguous
    columns: tl.tensor,
    stride_x: tl.tensor,  # of rows; columns are contiguous
    stride_cond: tl.tensor,
    stride_uncond: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    i_row, o = row_and_columns(columns, BLOCK)
    m = o < columns
    b_x = tl.load(p_x + i_row * stride_x + o, mask=m, other=0.0).to(tl.float32)  # [BLOCK]
    b_cond = tl.load(p_cond + i_row * stride_cond + o, mask=m, other=0.0).to(tl.float32)  # [BLOCK]
    b_uncond = tl.load(p_uncond + i_row * stride_uncond + o, mask=m, other=0.0).to(tl.float32)  # [BLOCK]
    b_v = b_uncond + tl.load(p_scale) * (b_cond - b_uncond)
    b_out = b_x + tl.load(p_dt) * b_v
    tl.store(p_out + i_row * columns + o, b_out.to(p_out.dtype.element_ty), mask=m)


def cfg_euler(x: Tensor, v_cond: Tensor, v_uncond: Tensor, scale: Tensor, dt: Tensor) -> Tensor:
    """Launch on tensors laid out by ``as_rows``; returns x's dtype and memory order."""
    grid, layout, options = launch_for(x, v_cond, v_uncond)
    out = result_like(x, layout)
    if out.numel() > 0:
        cfg_euler_kernel[grid](x, v_cond, v_uncond, scale, dt, out, layout.columns, *layout.strides, **options)
    return out


AOT_CASES = (AotCase("cfg_euler_kernel", {"BLOCK": BLOCK}, NUM_WARPS, lambda c: c["BLOCK"], float32("scale", "dt")),)
