"""LayerNorm and adaLN of a row in one pass: one read, one write (ops/norm_modulate.py)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from msdd_fast.kernels._aot import WIDTH, AotCase, float32
from msdd_fast.kernels._norm import normalise, row_config


@triton.jit
def norm_modulate_kernel(
    p_x: tl.tensor,  # (rows, WIDTH)
    p_shift: tl.tensor,  # (last + 1, WIDTH), rows stride_shift apart
    p_scale: tl.tensor,  # (last + 1, WIDTH), rows stride_scale apart
    p_out: tl.tensor,  # (rows, WIDTH)
    run: tl.tensor,  # row r takes row min(r // run, last) of the tables
    last: tl.tensor,
    stride_shift: tl.tensor,
    stride_scale: tl.tensor,
    WIDTH: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    i = tl.program_id(0).to(tl.int64)
    i_group = tl.minimum(i // run, last)
    o = tl.arange(0, BLOCK)
    m = o < WIDTH
    b_x = tl.load(p_x + i * WIDTH + o, mask=m, other=0.0).to(tl.float32)  # [BLOCK]
    b_shift = tl.load(p_shift + i_group * stride_shift + o, mask=m, other=0.0).to(tl.float32)  # [BLOCK]
    b_scale = tl.load(p_scale + i_group * stride_scale + o, mask=m, other=0.0).to(tl.float32)  # [BLOCK]
    b_h = normalise(b_x, m, WIDTH, EPS) * (1.0 + b_scale) + b_shift
    tl.store(p_out + i * WIDTH + o, b_h.to(p_out.dtype.element_ty), mask=m)


def norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, run: int, eps: float) -> Tensor:
    """Launch on contiguous x (*, D) and tables (G, D) with contiguous rows."""
    out = torch.empty_like(x)
    width = x.shape[-1]
    if out.numel() > 0:
        norm_modulate_kernel[(x.numel() // width,)](
            *(x, shift, scale, out, run, len(shift) - 1, shift.stride(0), scale.stride(0)),
            **dict(WIDTH=width, EPS=eps, **row_config(width), enable_fp_fusion=True),
        )
    return out


_ROWS = row_config(WIDTH)
AOT_CASES = (
    AotCase(
        "norm_modulate_kernel",
        {"WIDTH": WIDTH, "EPS": 1e-6, "BLOCK": _ROWS["BLOCK"]},
        _ROWS["num_warps"],
        outputs=lambda c: c["WIDTH"],
        types=float32("shift", "scale"),
    ),
)
