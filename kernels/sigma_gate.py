"""A gate per row or element, the sum that it makes, RMSNorm and adaLN in one pass (ops/sigma_gate.py)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from msdd_fast.kernels._aot import PID_WIDTH, AotCase, float32
from msdd_fast.kernels._norm import rms_normalise, row_config


@triton.jit
def sigma_gate_kernel(
    p_x: tl.tensor,  # (rows, WIDTH)
    p_y: tl.tensor,  # (rows, WIDTH)
    p_offset: tl.tensor,  # (rows, WIDTH if OFFSET_WIDE else 1)
    p_logit: tl.tensor,  # (rows, WIDTH if LOGIT_WIDE else 1); not read if WEIGHTED
    p_weight: tl.tensor,  # (WIDTH,); not read unless WEIGHTED
    p_shift: tl.tensor,  # (last + 1, WIDTH), rows stride_shift apart; not read unless NORMED, as the next three
    p_scale: tl.tensor,  # (last + 1, WIDTH), rows stride_scale apart
    p_rms: tl.tensor,  # (WIDTH,)
    p_out: tl.tensor,  # (rows, WIDTH)
    p_sum: tl.tensor,  # (rows, WIDTH): x + gate * y
    run: tl.tensor,  # row r takes row min(r // run, last) of the tables
    last: tl.tensor,
    stride_shift: tl.tensor,
    stride_scale: tl.tensor,
    WIDTH: tl.constexpr,
    EPS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    LOGIT_WIDE: tl.constexpr,
    OFFSET_WIDE: tl.constexpr,
    NORMED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    i = tl.program_id(0).to(tl.int64)
    o = tl.arange(0, BLOCK)
    m = o < WIDTH
    b_x = tl.load(p_x + i * WIDTH + o, mask=m, other=0.0).to(tl.float32)  # [BLOCK]
    b_y = tl.load(p_y + i * WIDTH + o, mask=m, other=0.0).to(tl.float32)  # [BLOCK]
    if WEIGHTED:
        b_weight = tl.load(p_weight + o, mask=m, other=0.0).to(tl.float32)  # [BLOCK]
        b_logit = tl.sum(b_x * b_weight, axis=-1, keep_dims=True)
    elif LOGIT_WIDE:
        b_logit = tl.load(p_logit + i * WIDTH + o, mask=m, other=0.0).to(tl.float32)  # [BLOCK]
    else:
        b_logit = tl.load(p_logit + i).to(tl.float32)
    if OFFSET_WIDE:
        b_offset = tl.load(p_offset + i * WIDTH + o, mask=m, other=0.0).to(tl.float32)  # [BLOCK]
    else:
        b_offset = tl.load(p_offset + i).to(tl.float32)
    b_gate = 1.0 / (1.0 + tl.exp(-(b_logit + b_offset)))
    b_sum = (b_x + b_gate * b_y).to(p_sum.dtype.element_ty)
    tl.store(p_sum + i * WIDTH + o, b_sum, mask=m)
    if NORMED:
        i_group = tl.minimum(i // run, last)
        b_shift = tl.load(p_shift + i_group * stride_shift + o, mask=m, other=0.0).to(tl.float32)  # [BLOCK]
        b_scale = tl.load(p_scale + i_group * stride_scale + o, mask=m, other=0.0).to(tl.float32)  # [BLOCK]
        b_rms = tl.load(p_rms + o, mask=m, other=0.0).to(tl.float32)  # [BLOCK]
        b_h = b_rms * rms_normalise(b_sum.to(tl.float32), WIDTH, EPS) * (1.0 + b_scale) + b_shift
        tl.store(p_out + i * WIDTH + o, b_h.to(p_out.dtype.element_ty), mask=m)


def sigma_gate(
    x: Tensor,
    y: Tensor,
    offset: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    rms_weight: Tensor | None,
    logit: Tensor | None,
    weight: Tensor | None,
    run: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Launch on contiguous operands, tables (G, D) with contiguous rows; without shift the second result is empty."""
    width, normed = x.shape[-1], shift is not None
    x_new, h = torch.empty_like(x), torch.empty_like(x) if normed else x.new_empty(0)
    if x_new.numel() > 0:
        last, stride_shift = (0, 0) if shift is None else (len(shift) - 1, shift.stride(0))
        sigma_gate_kernel[(x.numel() // width,)](
            *(x, y, offset, offset if logit is None else logit, x if weight is None else weight),
            *(x if t is None else t for t in (shift, scale, rms_weight)),  # not read
            *(h if normed else x_new, x_new, run, last, stride_shift, 0 if scale is None else scale.stride(0)),
            **dict(WIDTH=width, EPS=eps, WEIGHTED=weight is not None, NORMED=normed),
            **dict(LOGIT_WIDE=logit is not None and logit.shape[-1] != 1, OFFSET_WIDE=offset.shape[-1] != 1),
            **row_config(width),
            enable_fp_fusion=True,
        )
    return x_new, h


def _aot_case(weighted: bool) -> AotCase:
    config = row_config(PID_WIDTH)
    return AotCase(
        "sigma_gate_kernel",
        {
            **{"WIDTH": PID_WIDTH, "EPS": 1e-6, "WEIGHTED": weighted, "LOGIT_WIDE": not weighted, "NORMED": True},
            **{"OFFSET_WIDE": not weighted, "BLOCK": config["BLOCK"]},
        },
        config["num_warps"],
        outputs=lambda c: 2 * c["WIDTH"],
        types=float32("offset", "weight", "shift", "scale", "rms"),
        variant="a gate per row" if weighted else "a gate per element",
    )


AOT_CASES = (_aot_case(True), _aot_case(False))
