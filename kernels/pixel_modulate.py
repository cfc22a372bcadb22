"""RMSNorm and adaLN of pixels with a modulation of their own: three reads, one write (ops/pixel_modulate.py)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from msdd_fast.kernels._aot import PID_CHANNELS, AotCase, float32
from msdd_fast.kernels._norm import rms_normalise
from msdd_fast.kernels._pixels import modulation_chunks

BLOCK = 64
NUM_WARPS = 4


@triton.jit
def pixel_modulate_kernel(
    p_x: tl.tensor,  # (pixels, CHANNELS)
    p_modulation: tl.tensor,  # (pixels, 2, CHANNELS): shift, scale
    p_weight: tl.tensor,  # (CHANNELS,)
    p_out: tl.tensor,  # (pixels, CHANNELS)
    pixels: tl.tensor,
    CHANNELS: tl.constexpr,
    EPS: tl.constexpr,
    PADDED: tl.constexpr,  # power of 2, at least CHANNELS
    BLOCK: tl.constexpr,
) -> None:
    o_pixel = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    o = tl.arange(0, PADDED)[None, :]
    m_channel = o < CHANNELS
    m = (o_pixel < pixels)[:, None] & m_channel
    o_pixel = o_pixel[:, None]
    b_x = tl.load(p_x + o_pixel * CHANNELS + o, mask=m, other=0.0).to(tl.float32)  # [BLOCK, PADDED]
    b_shift = tl.load(p_modulation + o_pixel * (2 * CHANNELS) + o, mask=m, other=0.0).to(tl.float32)
    b_scale = tl.load(p_modulation + o_pixel * (2 * CHANNELS) + CHANNELS + o, mask=m, other=0.0).to(tl.float32)
    b_weight = tl.load(p_weight + o, mask=m_channel, other=0.0).to(tl.float32)  # [1, PADDED]
    b_h = b_weight * rms_normalise(b_x, CHANNELS, EPS) * (1.0 + b_scale) + b_shift
    tl.store(p_out + o_pixel * CHANNELS + o, b_h.to(p_out.dtype.element_ty), mask=m)


def pixel_modulate(x: Tensor, s: Tensor, weight: Tensor, bias: Tensor, rms_weight: Tensor, eps: float) -> Tensor:
    """Launch on contiguous x (R, K, C), chunk by chunk of the tokens; (R, K, C) in the dtype of s."""
    out = torch.empty(x.shape, dtype=s.dtype, device=x.device)
    if out.numel() == 0:
        return out
    channels = x.shape[2]
    for tokens, modulation in modulation_chunks(s, weight, bias):
        pixels = x[tokens].numel() // channels
        pixel_modulate_kernel[(triton.cdiv(pixels, BLOCK),)](
            *(x[tokens], modulation, rms_weight, out[tokens], pixels),
            **dict(CHANNELS=channels, EPS=eps, PADDED=triton.next_power_of_2(channels)),
            **dict(BLOCK=BLOCK, num_warps=NUM_WARPS, enable_fp_fusion=True),
        )
    return out


AOT_CASES = (
    AotCase(
        "pixel_modulate_kernel",
        {"CHANNELS": PID_CHANNELS, "EPS": 1e-6, "PADDED": triton.next_power_of_2(PID_CHANNELS), "BLOCK": BLOCK},
        NUM_WARPS,
        outputs=lambda c: c["BLOCK"] * c["CHANNELS"],
        types=float32("weight"),
    ),
)
