"""Gated residual, RMSNorm, adaLN, MLP and gated residual of pixels in one pass (ops/pixel_block.py).

A program takes BLOCK pixels. The MLP's two products are tl.dot; its hidden channels stay in registers.
"""

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
def pixel_block_kernel(
    p_x: tl.tensor,  # (pixels, CHANNELS)
    p_y: tl.tensor,  # (pixels, CHANNELS)
    p_modulation: tl.tensor,  # (pixels, 4, CHANNELS): gate1, shift2, scale2, gate2
    p_weight: tl.tensor,  # (CHANNELS,)
    p_fc1: tl.tensor,  # (HIDDEN, CHANNELS)
    p_fc1_bias: tl.tensor,  # (HIDDEN,)
    p_fc2: tl.tensor,  # (CHANNELS, HIDDEN)
    p_fc2_bias: tl.tensor,  # (CHANNELS,)
    p_out: tl.tensor,  # (pixels, CHANNELS)
    pixels: tl.tensor,
    CHANNELS: tl.constexpr,
    HIDDEN: tl.constexpr,
    EPS: tl.constexpr,
    WIDEN: tl.constexpr,  # for the interpreter, which multiplies the bits of bfloat16
    PADDED: tl.constexpr,  # power of 2, at least CHANNELS and 16
    PADDED_HIDDEN: tl.constexpr,  # power of 2, at least HIDDEN and 16
    BLOCK: tl.constexpr,
) -> None:
    o_pixel = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    o = tl.arange(0, PADDED)
    o_hidden = tl.arange(0, PADDED_HIDDEN)
    m_channel, m_hidden = o < CHANNELS, o_hidden < HIDDEN
    m = (o_pixel < pixels)[:, None] & m_channel[None, :]
    o_x = o_pixel[:, None] * CHANNELS + o[None, :]
    p_pixel = p_modulation + o_pixel[:, None] * (4 * CHANNELS) + o[None, :]
    b_x = tl.load(p_x + o_x, mask=m, other=0.0).to(tl.float32)  # [BLOCK, PADDED]
    b_y = tl.load(p_y + o_x, mask=m, other=0.0).to(tl.float32)  # [BLOCK, PADDED]
    b_x += tl.load(p_pixel, mask=m, other=0.0).to(tl.float32) * b_y  # [BLOCK, PADDED]
    b_shift = tl.load(p_pixel + CHANNELS, mask=m, other=0.0).to(tl.float32)  # [BLOCK, PADDED]
    b_scale = tl.load(p_pixel + 2 * CHANNELS, mask=m, other=0.0).to(tl.float32)  # [BLOCK, PADDED]
    b_weight = tl.load(p_weight + o, mask=m_channel, other=0.0).to(tl.float32)[None, :]  # [1, PADDED]
    b_h = b_weight * rms_normalise(b_x, CHANNELS, EPS) * (1.0 + b_scale) + b_shift
    o_fc1 = o[:, None] + o_hidden[None, :] * CHANNELS
    b_fc1 = tl.load(p_fc1 + o_fc1, mask=m_channel[:, None] & m_hidden[None, :], other=0.0)  # [PADDED, PADDED_HIDDEN]
    b_fc1_bias = tl.load(p_fc1_bias + o_hidden, mask=m_hidden, other=0.0).to(tl.float32)  # [PADDED_HIDDEN]
    o_fc2 = o_hidden[:, None] + o[None, :] * HIDDEN
    b_fc2 = tl.load(p_fc2 + o_fc2, mask=m_hidden[:, None] & m_channel[None, :], other=0.0)  # [PADDED_HIDDEN, PADDED]
    b_fc2_bias = tl.load(p_fc2_bias + o, mask=m_channel, other=0.0).to(tl.float32)  # [PADDED]
    b_h = b_h.to(b_fc1.dtype)
    if WIDEN:
        b_h, b_fc1 = b_h.to(tl.float32), b_fc1.to(tl.float32)
    b_hidden = tl.dot(b_h, b_fc1, input_precision="ieee") + b_fc1_bias[None, :]  # [BLOCK, PADDED_HIDDEN]
    b_hidden = 0.5 * b_hidden * (1.0 + tl.erf(b_hidden * 0.7071067811865476))
    b_hidden = b_hidden.to(b_fc2.dtype)
    if WIDEN:
        b_hidden, b_fc2 = b_hidden.to(tl.float32), b_fc2.to(tl.float32)
    b_mlp = tl.dot(b_hidden, b_fc2, input_precision="ieee") + b_fc2_bias[None, :]  # [BLOCK, PADDED]
    b_gate2 = tl.load(p_pixel + 3 * CHANNELS, mask=m, other=0.0).to(tl.float32)  # [BLOCK, PADDED]
    tl.store(p_out + o_x, (b_x + b_gate2 * b_mlp).to(p_out.dtype.element_ty), mask=m)


def pixel_block(
    x: Tensor,
    y: Tensor,
    s: Tensor,
    weight: Tensor,
    bias: Tensor,
    rms_weight: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    eps: float,
) -> Tensor:
    """Launch on contiguous x and y (R, K, C), chunk by chunk of the tokens; (R, K, C) in the dtype of x."""
    out = torch.empty_like(x)
    if out.numel() == 0:
        return out
    channels, hidden = x.shape[2], len(fc1_weight)
    for tokens, modulation in modulation_chunks(s, weight, bias):
        pixels = x[tokens].numel() // channels
        pixel_block_kernel[(triton.cdiv(pixels, BLOCK),)](
            *(x[tokens], y[tokens], modulation, rms_weight, fc1_weight, fc1_bias, fc2_weight, fc2_bias, out[tokens]),
            pixels,
            **dict(CHANNELS=channels, HIDDEN=hidden, EPS=eps, WIDEN=x.device.type == "cpu"),
            **pixel_config(channels, hidden),
            enable_fp_fusion=True,
        )
    return out


def pixel_config(channels: int, hidden: int) -> dict[str, int]:
    """Padded sizes, BLOCK and num_warps."""
    padded, wide = (max(16, triton.next_power_of_2(size)) for size in (channels, hidden))
    return {"PADDED": padded, "PADDED_HIDDEN": wide, "BLOCK": BLOCK, "num_warps": NUM_WARPS}


_SIZES = {k: v for k, v in pixel_config(PID_CHANNELS, 4 * PID_CHANNELS).items() if k != "num_warps"}
AOT_CASES = (
    AotCase(
        "pixel_block_kernel",
        {"CHANNELS": PID_CHANNELS, "HIDDEN": 4 * PID_CHANNELS, "EPS": 1e-6, "WIDEN": False, **_SIZES},
        NUM_WARPS,
        outputs=lambda c: c["BLOCK"] * c["CHANNELS"],
        types=float32("weight"),
    ),
)
