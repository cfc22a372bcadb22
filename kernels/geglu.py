"""value * gelu(gate) in one pass: two reads, one write (ops/geglu.py)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from msdd_fast.kernels._aot import HIDDEN, AotCase
from msdd_fast.kernels.swiglu import block_config


@triton.jit
def geglu_kernel(
    p_value: tl.tensor,  # (rows, width), rows stride_value apart
    p_gate: tl.tensor,  # (rows, width), rows stride_gate apart
    p_out: tl.tensor,  # (rows, width)
    width: tl.tensor,
    stride_value: tl.tensor,
    stride_gate: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    i = tl.program_id(0).to(tl.int64)
    o = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m = o < width
    b_value = tl.load(p_value + i * stride_value + o, mask=m, other=0.0).to(tl.float32)  # [BLOCK]
    b_gate = tl.load(p_gate + i * stride_gate + o, mask=m, other=0.0).to(tl.float32)  # [BLOCK]
    b_out = b_value * (0.5 * b_gate * (1.0 + tl.erf(b_gate * 0.7071067811865476)))
    tl.store(p_out + i * width + o, b_out.to(p_out.dtype.element_ty), mask=m)


def geglu(value: Tensor, gate: Tensor) -> Tensor:
    """Launch on value and gate (R, I) with contiguous rows."""
    out = torch.empty(value.shape, dtype=value.dtype, device=value.device)
    rows, width = value.shape
    if out.numel() > 0:
        config = block_config(width)
        geglu_kernel[(rows, triton.cdiv(width, config["BLOCK"]))](
            value, gate, out, width, value.stride(0), gate.stride(0), **config, enable_fp_fusion=True
        )
    return out


_BLOCK = block_config(HIDDEN)
AOT_CASES = (
    AotCase(
        "geglu_kernel",
        {"BLOCK": _BLOCK["BLOCK"]},
        _BLOCK["num_warps"],
        outputs=lambda c: c["BLOCK"],
        within=("y",),
    ),
)
