"""Gated residual, LayerNorm or RMSNorm and adaLN of a row in one pass: two reads, two writes (ops of the same name)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from msdd_fast.kernels._aot import PID_WIDTH, WIDTH, AotCase, float32
from msdd_fast.kernels._norm import normalise, rms_normalise, row_config
from msdd_fast.kernels.norm_modulate import weight_stride


@triton.jit
def gate_residual_norm_modulate_kernel(
    p_x: tl.tensor,  # (rows, WIDTH)
    p_y: tl.tensor,  # (rows, WIDTH)
    p_gate: tl.tensor,  # (last + 1, WIDTH), rows stride_gate apart; shift and scale likewise
    p_shift: tl.tensor,
    p_scale: tl.tensor,
    p_weight: tl.tensor,  # likewise; not read unless RMS
    p_sum: tl.tensor,  # (rows, WIDTH): x + gate * y
    p_out: tl.tensor,  # (rows, WIDTH)
    run: tl.tensor,  # row r takes row min(r // run, last) of the tables
    last: tl.tensor,
    stride_gate: tl.tensor,
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
    b_y = tl.load(p_y + i * WIDTH + o, mask=m, other=0.0).to(tl.float32)  # [BLOCK]
    b_gate = tl.load(p_gate + i_group * stride_gate + o, mask=m, other=0.0).to(tl.float32)  # [BLOCK]
    b_shift = tl.load(p_shift + i_group * stride_shift + o, mask=m, other=0.0).to(tl.float32)  # [BLOCK]
    b_scale = tl.load(p_scale + i_group * stride_scale + o, mask=m, other=0.0).to(tl.float32)  # [BLOCK]
    b_sum = (b_x + b_gate * b_y).to(p_sum.dtype.element_ty)
    tl.store(p_sum + i * WIDTH + o, b_sum, mask=m)
    if RMS:
        b_weight = tl.load(p_weight + i_group * stride_weight + o, mask=m, other=0.0).to(tl.float32)  # [BLOCK]
        b_h = b_weight * rms_normalise(b_sum.to(tl.float32), WIDTH, EPS) * (1.0 + b_scale) + b_shift
    else:
        b_h = normalise(b_sum.to(tl.float32), m, WIDTH, EPS) * (1.0 + b_scale) + b_shift
    tl.store(p_out + i * WIDTH + o, b_h.to(p_out.dtype.element_ty), mask=m)


def gate_residual_norm_modulate(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    run: int,
    eps: float,
    rms_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Launch on contiguous x and y (*, D), tables (G, D) with contiguous rows, and a weight (D,) or (G, D)."""
    x_new, h = torch.empty_like(x), torch.empty_like(x)
    width = x.shape[-1]
    if h.numel() > 0:
        gate_residual_norm_modulate_kernel[(x.numel() // width,)](
            *(x, y, gate, shift, scale, shift if rms_weight is None else rms_weight, x_new, h),
            *(run, len(shift) - 1, gate.stride(0), shift.stride(0), scale.stride(0), weight_stride(rms_weight)),
            **dict(WIDTH=width, EPS=eps, RMS=rms_weight is not None, **row_config(width), enable_fp_fusion=True),
        )
    return x_new, h


def _aot_case(width: int, rms: bool) -> AotCase:
    rows = row_config(width)
    return AotCase(
        "gate_residual_norm_modulate_kernel",
        {"WIDTH": width, "EPS": 1e-6, "RMS": rms, "BLOCK": rows["BLOCK"]},
        rows["num_warps"],
        outputs=lambda c: 2 * c["WIDTH"],
        types=float32("gate", "shift", "scale", "weight"),
        variant="RMS" if rms else "",
    )


AOT_CASES = (_aot_case(WIDTH, False), _aot_case(PID_WIDTH, True))
