"""v_uncond + scale * (v_cond - v_uncond) in one pass, fp32 inside (see msdd_fast/ops/cfg_combine.py)."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from msdd_fast.kernels._rows import launch_for, result_like, row_and_columns


@triton.jit
def cfg_combine_kernel(
    p_cond,  # (rows, columns)
    p_uncond,  # (rows, columns)
    p_scale,  # () fp32
    p_out,  # (rows, columns), contiguous
    columns,
    stride_cond,  # of rows; columns are contiguous
    stride_uncond,
    BLOCK: tl.constexpr,
):
    i_row, o = row_and_columns(columns, BLOCK)
    m = o < columns
    b_cond = tl.load(p_cond + i_row * stride_cond + o, mask=m, other=0.0).to(tl.float32)  # [BLOCK]
    b_uncond = tl.load(p_uncond + i_row * stride_uncond + o, mask=m, other=0.0).to(tl.float32)  # [BLOCK]
    b_v = b_uncond + tl.load(p_scale) * (b_cond - b_uncond)
    tl.store(p_out + i_row * columns + o, b_v.to(p_out.dtype.element_ty), mask=m)


def cfg_combine(v_cond: Tensor, v_uncond: Tensor, scale: Tensor) -> Tensor:
    """Launch on velocities as ``as_rows`` makes them; returns the dtype and memory order of ``v_cond``."""
    grid, layout, options = launch_for(v_cond, v_uncond)
    out = result_like(v_cond, layout)
    if out.numel() > 0:
        cfg_combine_kernel[grid](v_cond, v_uncond, scale, out, layout.columns, *layout.strides, **options)
    return out
