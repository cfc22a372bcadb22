"""The image's estimate and new noise in one pass; the noise is made in registers (see msdd_fast/ops/sde_step.py).

One lane makes ``K`` horizontally adjacent 2x2 blocks, so that each of its two lines is one 16-byte store.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from msdd_fast.kernels._aot import PID_PATCH, AotCase, float32
from msdd_fast.kernels._noise import PURPOSE_RENOISE
from msdd_fast.kernels.renoise_upsample import blocks_per_lane
from msdd_fast.kernels.start_noise import white_blocks

BLOCK = 128
NUM_WARPS = 4
NO_NOISE, GIVEN, SEEDED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def estimate(b_x: tl.tensor, b_v: tl.tensor, t: tl.tensor) -> tl.tensor:
    """x - t * v in float64, where the product is exact, then rounded to float32."""
    return (b_x.to(tl.float64) - t.to(tl.float64) * b_v.to(tl.float64)).to(tl.float32)


@triton.jit
def velocity_offsets(
    o_plane: tl.tensor,
    o_y: tl.tensor,
    o_x: tl.tensor,
    o_channel: tl.tensor,
    i_image: tl.tensor,
    channels: tl.tensor,
    width: tl.tensor,
    batch: tl.tensor,
    PATCH: tl.constexpr,
) -> tl.tensor:
    """Of pixels at line o_y and column o_x: o_plane in an image, or where the pixels of tokens have them."""
    if PATCH == 0:
        return o_plane
    o_token = (o_y // PATCH).to(tl.int64) * (width // PATCH) + o_x // PATCH
    o_pixel = (o_token * batch + i_image) * (PATCH * PATCH) + o_y % PATCH * PATCH + o_x % PATCH
    return o_pixel * channels + o_channel


@triton.jit(do_not_specialize=["stage"])
def sde_step_kernel(
    p_x: tl.tensor,  # (B, C, H, W)
    p_v: tl.tensor,  # the same, or (N, B, PATCH * PATCH, C)
    p_noise: tl.tensor,  # (B, C, H, W); read if NOISE is GIVEN
    p_out: tl.tensor,  # (B, C, H, W)
    p_t: tl.tensor,  # () fp32
    p_next: tl.tensor,  # () fp32; not read if NOISE is NO_NOISE
    p_seeds: tl.tensor,  # (B,) int64; read if NOISE is SEEDED
    stage: tl.tensor,
    channels: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    batch: tl.tensor,
    PATCH: tl.constexpr,
    NOISE: tl.constexpr,
    CLAMP: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    i_image = tl.program_id(1).to(tl.int64)
    groups, pairs = tl.cdiv(width, 2 * K), tl.cdiv(height, 2)
    o_lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # within an image: fits in 32 bits
    o_pair = o_lane // groups  # [BLOCK]: a channel's pair of lines
    o_col = (o_lane - o_pair * groups) * (2 * K)
    o_channel = o_pair // pairs
    o_y = (o_pair - o_channel * pairs) * 2
    o_x = o_col[:, None] + tl.arange(0, 2 * K)[None, :]  # [BLOCK, 2K]
    m_top = (o_channel < channels)[:, None] & (o_x < width)
    m_low = m_top & (o_y + 1 < height)[:, None]
    o_top = (((i_image * channels + o_channel) * height + o_y) * width)[:, None] + o_x
    o_low = o_top + width
    o_rest = (o_x, o_channel[:, None], i_image, channels, width, batch)
    o_vtop = velocity_offsets(o_top, o_y[:, None], *o_rest, PATCH)
    o_vlow = velocity_offsets(o_low, o_y[:, None] + 1, *o_rest, PATCH)
    t = tl.load(p_t)
    b_top = estimate(tl.load(p_x + o_top, mask=m_top, other=0.0), tl.load(p_v + o_vtop, mask=m_top, other=0.0), t)
    b_low = estimate(tl.load(p_x + o_low, mask=m_low, other=0.0), tl.load(p_v + o_vlow, mask=m_low, other=0.0), t)
    if NOISE != NO_NOISE:
        t_next = tl.load(p_next)
        if NOISE == SEEDED:
            counter = (o_pair.to(tl.int64) * (width // 2) + o_col // 2).to(tl.uint32)
            b_ntop, b_nlow = white_blocks(tl.load(p_seeds + i_image), counter, stage, PURPOSE_RENOISE, K)
            b_ntop, b_nlow = b_ntop.reshape(BLOCK, 2 * K), b_nlow.reshape(BLOCK, 2 * K)
        else:
            b_ntop = tl.load(p_noise + o_top, mask=m_top, other=0.0).to(tl.float32)  # [BLOCK, 2K]
            b_nlow = tl.load(p_noise + o_low, mask=m_low, other=0.0).to(tl.float32)  # [BLOCK, 2K]
        b_top = (1.0 - t_next) * b_top + t_next * b_ntop
        b_low = (1.0 - t_next) * b_low + t_next * b_nlow
    if CLAMP:  # a NaN stays
        b_top = tl.where(b_top < -1.0, -1.0, tl.where(b_top > 1.0, 1.0, b_top))
        b_low = tl.where(b_low < -1.0, -1.0, tl.where(b_low > 1.0, 1.0, b_low))
    tl.store(p_out + o_top, b_top.to(p_out.dtype.element_ty), mask=m_top)
    tl.store(p_out + o_low, b_low.to(p_out.dtype.element_ty), mask=m_low)


def sde_step(
    x: Tensor,
    v: Tensor,
    t: Tensor,
    t_next: Tensor | None,
    seeds: Tensor | None,
    stage: int,
    noise: Tensor | None,
    patch: int,
    clamp: bool,
) -> Tensor:
    """Launch on contiguous operands; ``patch`` 0 for a v like x (B, C, H, W)."""
    out = torch.empty_like(x)
    if out.numel() == 0:
        return out
    batch, channels, height, width = x.shape
    k = blocks_per_lane(x.dtype)
    kind = NO_NOISE if t_next is None else GIVEN if seeds is None else SEEDED
    lanes = channels * triton.cdiv(height, 2) * triton.cdiv(width, 2 * k)
    sde_step_kernel[(triton.cdiv(lanes, BLOCK), batch)](
        *(x, v, x if noise is None else noise, out, t, t if t_next is None else t_next),
        *(x if seeds is None else seeds, stage, channels, height, width, batch),
        **dict(PATCH=patch, NOISE=kind.value, CLAMP=clamp, K=k, BLOCK=BLOCK),
        num_warps=NUM_WARPS,
        enable_fp_fusion=True,
    )
    return out


def _aot_case(patch: int, kind: tl.constexpr) -> AotCase:
    return AotCase(
        "sde_step_kernel",
        lambda itemsize: {
            **{"PATCH": patch, "NOISE": kind.value, "CLAMP": kind is NO_NOISE, "K": 16 // (2 * itemsize)},
            "BLOCK": BLOCK,
        },
        NUM_WARPS,
        outputs=lambda c: 4 * c["K"] * c["BLOCK"],
        types={"p_seeds": "*i64", **float32("t", "next")},
        variant="seeded" if kind is SEEDED else "last",
        within=("x",),
    )


AOT_CASES = (_aot_case(PID_PATCH, SEEDED), _aot_case(PID_PATCH, NO_NOISE))
