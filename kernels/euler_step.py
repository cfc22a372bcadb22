"""x + dt * v in one pass, fp32 inside: two reads, one write (see msdd_fast/ops/euler_step.py)."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from msdd_fast.kernels._aot import AotCase, float32
from msdd_fast.kernels._rows import BLOCK, NUM_WARPS, launch_for, result_like, row_and_columns


@triton.jit
def euler_step_kernel(
    p_x: tl.tensor,  # (rows, columns)
    p_v: tl.tensor,  # (rows, columns)
    p_dt: tl.tensor,  # () fp32
    p_out: tl.tensor,  # (rows, columns), contiguous
    columns: tl.tensor,
    stride_x: tl.tensor,  # of rows; columns are contiguous
    stride_v: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    i_row, o = row_and_columns(columns, BLOCK)
    m = o < columns
    b_x = tl.load(p_x + i_row * stride_x + o, mask=m, other=0.0).to(tl.float32)  # [BLOCK]
    b_v = tl.load(p_v + i_row * stride_v + o, mask=m, other=0.0).to(tl.float32)  # [BLOCK]
    tl.store(p_out + i_row * columns + o, (b_x + tl.load(p_dt) * b_v).to(p_out.dtype.element_ty), mask=m)


def euler_step(x: Tensor, v: Tensor, dt: Tensor) -> Tensor:
    """Launch on x and v laid out by ``as_rows``; returns x's dtype and memory order."""
    grid, layout, options = launch_for(x, v)
    out = result_like(x, layout)
    if out.numel() > 0:
        euler_step_kernel[grid](x, v, dt, out, layout.columns, *layout.strides, **options)
    return out


AOT_CASES = (AotCase("euler_step_kernel", {"BLOCK": BLOCK}, NUM_WARPS, lambda c: c["BLOCK"], float32("dt")),)
