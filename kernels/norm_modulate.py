"""LayerNorm or RMSNorm and adaLN of a row in one pass: one read, one write (ops/norm_modulate.py)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from msdd_fast.kernels._aot import PID_WIDTH, WIDTH, AotCase, float32
from msdd_fast.kernels._norm import normalise, rms_normalise, row_config


@triton.jit
def norm_modulate_kernel(
    p_x: tl.tensor,  # (rows, WIDTH)
    p_shift: tl.tensor,  # (last + 1, WIDTH), rows stride_shift apart
    p_scale: tl.tensor,  # (last + 1, WIDTH), rows stride_scale apart
    p_weight: tl.tensor,  # (last + 1, WIDTH), rows stride_weight apart; not read unless RMS
    p_out: tl.tensor,  # (rows, WIDTH)
    run: tl.tensor,  # row r takes row min(r // run, last) of the tables
    last: tl.tensor,
    stride_shift: tl.tensor,
    stride_scale: tl.tensor,
    stride_weight: tl.tensor,
    WIDTH: tl.constexpr,
    EPS: tl.constexpr,
    RMS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    i = tl.program_id(0).to(tl.int64)
    i_group = tl.minimum(i // run, last)
    o = tl.arange(0, BLOCK)
    m = o < WIDTH
    b_x = tl.load(p_x + i * WIDTH + o, mask=m, other=0.0).to(tl.float32)  # [BLOCK]
    b_shift = tl.load(p_shift + i_group * stride_shift + o, mask=m, other=0.0).to(tl.float32)  # [BLOCK]
    b_scale = tl.load(p_scale + i_group * stride_scale + o, mask=m, other=0.0).to(tl.float32)  # [BLOCK]
    if RMS:
        b_weight = tl.load(p_weight + i_group * stride_weight + o, mask=m, other=0.0).to(tl.float32)  # [BLOCK]
        b_h = b_weight * rms_normalise(b_x, WIDTH, EPS) * (1.0 + b_scale) + b_shift
    else:
        b_h = normalise(b_x, m, WIDTH, EPS) * (1.0 + b_scale) + b_shift
    tl.store(p_out + i * WIDTH + o, b_h.to(p_out.dtype.element_ty), mask=m)


def norm_modulate(
    x: Tensor, shift: Tensor, scale: Tensor, run: int, eps: float, rms_weight: Tensor | None = None
) -> Tensor:
    """Launch on contiguous x (*, D), tables (G, D) with contiguous rows, and a weight (D,) or (G, D)."""
    out = torch.empty_like(x)
    width = x.shape[-1]
    if out.numel() > 0:
        norm_modulate_kernel[(x.numel() // width,)](
            *(x, shift, scale, shift if rms_weight is None else rms_weight, out),
            *(run, len(shift) - 1, shift.stride(0), scale.stride(0), weight_stride(rms_weight)),
            **dict(WIDTH=width, EPS=eps, RMS=rms_weight is not None, **row_config(width), enable_fp_fusion=True),
        )
    return out


def weight_stride(rms_weight: Tensor | None) -> int:
    """Between the weights of runs of rows; 0 where all share one."""
    return rms_weight.stride(0) if rms_weight is not None and rms_weight.ndim == 2 else 0


def _aot_case(width: int, rms: bool) -> AotCase:
    rows = row_config(width)
    return AotCase(
        "norm_modulate_kernel",
        {"WIDTH": width, "EPS": 1e-6, "RMS": rms, "BLOCK": rows["BLOCK"]},
        rows["num_warps"],
        outputs=lambda c: c["WIDTH"],
        types=float32("shift", "scale", "weight"),
        variant="RMS" if rms else "",
    )


AOT_CASES = (_aot_case(WIDTH, False), _aot_case(PID_WIDTH, True))
