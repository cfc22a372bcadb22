"""A row's largest magnitude, scale and float8 numbers in one pass: one read, one write (ops/quantize_rows.py)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from msdd_fast.kernels._aot import FLOAT8, WIDTH, AotCase, float32
from msdd_fast.kernels._norm import row_config


@triton.jit
def quantize_rows_kernel(
    p_x: tl.tensor,  # (rows, WIDTH)
    p_out: tl.tensor,  # (rows, WIDTH) float8
    p_scale: tl.tensor,  # (rows,) fp32
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    i = tl.program_id(0).to(tl.int64)
    o = tl.arange(0, BLOCK)
    m = o < WIDTH
    b_x = tl.load(p_x + i * WIDTH + o, mask=m, other=0.0).to(tl.float32)  # [BLOCK]
    b_amax = tl.maximum(tl.max(tl.abs(b_x), axis=0), 1e-12)
    b_out = b_x * tl.div_rn(448.0, b_amax)
    tl.store(p_out + i * WIDTH + o, b_out.to(p_out.dtype.element_ty), mask=m)
    tl.store(p_scale + i, tl.div_rn(b_amax, 448.0))


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Launch on contiguous x (R, D)."""
    rows, width = x.shape
    out = torch.empty(rows, width, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    if rows > 0:
        quantize_rows_kernel[(rows,)](x, out, scale, WIDTH=width, **row_config(width), enable_fp_fusion=True)
    return out, scale


_ROWS = row_config(WIDTH)
AOT_CASES = (
    AotCase(
        "quantize_rows_kernel",
        {"WIDTH": WIDTH, "BLOCK": _ROWS["BLOCK"]},
        _ROWS["num_warps"],
        outputs=lambda c: c["WIDTH"],
        types={"p_out": "*fp8e4nv", **float32("scale")},
        targets=FLOAT8,
    ),
)
