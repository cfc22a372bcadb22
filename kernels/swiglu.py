"""silu(a) * b in one pass: two reads, one write (ops/swiglu.py)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from msdd_fast.kernels._aot import HIDDEN, AotCase


@triton.jit
def swiglu_kernel(
    p_a: tl.tensor,  # (rows, width), rows stride_a apart
    p_b: tl.tensor,  # (rows, width), rows stride_b apart
    p_out: tl.tensor,  # (rows, width)
    width: tl.tensor,
    stride_a: tl.tensor,
    stride_b: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    i = tl.program_id(0).to(tl.int64)
    o = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m = o < width
    b_a = tl.load(p_a + i * stride_a + o, mask=m, other=0.0).to(tl.float32)  # [BLOCK]
    b_b = tl.load(p_b + i * stride_b + o, mask=m, other=0.0).to(tl.float32)  # [BLOCK]
    b_out = b_a / (1.0 + tl.exp(-b_a)) * b_b
    tl.store(p_out + i * width + o, b_out.to(p_out.dtype.element_ty), mask=m)


def block_config(width: int) -> dict[str, int]:
    """BLOCK and num_warps: eight elements a lane, so 16 bytes of a 16-bit dtype."""
    block = min(1024, max(256, triton.next_power_of_2(width)))
    return {"BLOCK": block, "num_warps": block // 256}


def swiglu(a: Tensor, b: Tensor) -> Tensor:
    """Launch on a and b (R, I) with contiguous rows."""
    out = torch.empty(a.shape, dtype=a.dtype, device=a.device)
    rows, width = a.shape
    if out.numel() > 0:
        config = block_config(width)
        swiglu_kernel[(rows, triton.cdiv(width, config["BLOCK"]))](
            a, b, out, width, a.stride(0), b.stride(0), **config, enable_fp_fusion=True
        )
    return out


_BLOCK = block_config(HIDDEN)
AOT_CASES = (
    AotCase(
        "swiglu_kernel",
        {"BLOCK": _BLOCK["BLOCK"]},
        _BLOCK["num_warps"],
        outputs=lambda c: c["BLOCK"],
        within=("y",),
    ),
)
