"""alpha * nearest_x2(x) + beta * n in one pass; n is generated in registers (see ops/renoise_upsample.py).

Reads x once and writes the output once: 5 * B*C*H*W elements of traffic. One lane makes ``K`` horizontally adjacent
2x2 blocks, so that each of its two output rows is one 16-byte store.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from msdd_fast.diffusion.noise import correlation_factors
from msdd_fast.kernels._aot import NOISE_TYPES, AotCase
from msdd_fast.kernels._noise import PURPOSE_RENOISE, block_normals, correlate, interleave2, interleave4

BLOCK = 128
NUM_WARPS = 4


@triton.jit(do_not_specialize=["stage"])
def renoise_upsample_kernel(
    p_x: tl.tensor,  # (B, C*H, W)
    p_out: tl.tensor,  # (B, C*2H, 2W)
    p_alpha: tl.tensor,  # () fp32
    p_beta: tl.tensor,  # () fp32
    p_seeds: tl.tensor,  # (B,) int64
    stage: tl.tensor,
    rows: tl.tensor,  # C*H
    width: tl.tensor,  # W
    spread: tl.tensor,
    common: tl.tensor,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    i_image = tl.program_id(1).to(tl.int64)
    groups = tl.cdiv(width, K)
    o_group = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # within an image: fits in 32 bits
    o_row = o_group // groups  # [BLOCK]
    o_col = (o_group - o_row * groups) * K
    o_wide = tl.arange(0, K)[None, :]
    m_in = (o_row < rows)[:, None] & (o_col[:, None] + o_wide < width)
    p_image = p_x + i_image * rows * width
    o_row = o_row.to(tl.int64)
    o_block = o_row * width + o_col  # first block of the lane
    b_x = tl.load(p_image + o_block[:, None] + o_wide, mask=m_in, other=0.0).to(tl.float32)  # [BLOCK, K]
    b_x = b_x * tl.load(p_alpha)
    beta = tl.load(p_beta)
    spread, common = spread * beta, common * beta
    seed = tl.load(p_seeds + i_image)
    counter = o_block.to(tl.uint32)
    b_top, b_low = renoised_blocks(b_x, seed, counter, stage, spread, common, K, BLOCK)
    o_wide = tl.arange(0, 2 * K)[None, :]
    m_out = (o_row < rows)[:, None] & (2 * o_col[:, None] + o_wide < 2 * width)
    p_top = p_out + 4 * i_image * rows * width + (4 * o_row * width + 2 * o_col)[:, None] + o_wide
    tl.store(p_top, b_top.to(p_out.dtype.element_ty), mask=m_out)
    tl.store(p_top + 2 * width, b_low.to(p_out.dtype.element_ty), mask=m_out)


@triton.jit
def renoised_blocks(
    b_x: tl.tensor,
    seed: tl.tensor,
    counter: tl.tensor,
    stage: tl.tensor,
    spread: tl.tensor,
    common: tl.tensor,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """K neighbouring blocks per lane, pixels b_x [BLOCK, K], counters from [BLOCK] on: rows top and low [BLOCK, 2K]."""
    if K == 1:
        t00, t01, l00, l01 = renoised_block(b_x.reshape(BLOCK), seed, counter, stage, spread, common)
        b_top = tl.join(t00, t01)
        b_low = tl.join(l00, l01)
    elif K == 2:
        b_x0, b_x1 = tl.split(b_x)
        t00, t01, l00, l01 = renoised_block(b_x0, seed, counter, stage, spread, common)
        t10, t11, l10, l11 = renoised_block(b_x1, seed, counter + 1, stage, spread, common)
        b_top = interleave2(t00, t01, t10, t11)
        b_low = interleave2(l00, l01, l10, l11)
    else:
        b_even, b_odd = tl.split(b_x.reshape(BLOCK, 2, 2))
        b_x0, b_x2 = tl.split(b_even)
        b_x1, b_x3 = tl.split(b_odd)
        t00, t01, l00, l01 = renoised_block(b_x0, seed, counter, stage, spread, common)
        t10, t11, l10, l11 = renoised_block(b_x1, seed, counter + 1, stage, spread, common)
        t20, t21, l20, l21 = renoised_block(b_x2, seed, counter + 2, stage, spread, common)
        t30, t31, l30, l31 = renoised_block(b_x3, seed, counter + 3, stage, spread, common)
        b_top = interleave4(t00, t01, t10, t11, t20, t21, t30, t31)
        b_low = interleave4(l00, l01, l10, l11, l20, l21, l30, l31)
    return b_top.reshape(BLOCK, 2 * K), b_low.reshape(BLOCK, 2 * K)


@triton.jit
def renoised_block(
    x: tl.tensor, seed: tl.tensor, block: tl.tensor, stage: tl.tensor, spread: tl.tensor, common: tl.tensor
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """The four pixels of one 2x2 block per lane: x (already times alpha) + beta-scaled correlated noise."""
    n0, n1, n2, n3 = block_normals(seed, block, stage, PURPOSE_RENOISE)
    n0, n1, n2, n3 = correlate(n0, n1, n2, n3, spread, common)
    return x + n0, x + n1, x + n2, x + n3


@triton.jit(do_not_specialize=["stage"])
def renoise_upsample_channels_last_kernel(
    p_x: tl.tensor,  # (B, H, W, C)
    p_out: tl.tensor,  # (B, 2H, 2W, C)
    p_alpha: tl.tensor,  # () fp32
    p_beta: tl.tensor,  # () fp32
    p_seeds: tl.tensor,  # (B,) int64
    stage: tl.tensor,
    channels: tl.tensor,  # C
    height: tl.tensor,  # H
    width: tl.tensor,  # W
    spread: tl.tensor,
    common: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """One lane makes one block of one channel; neighbouring lanes are neighbouring channels, as in memory."""
    i_image = tl.program_id(1).to(tl.int64)
    size = channels * height * width
    o_in = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK], within an image: fits in 32 bits
    m = o_in < size
    o_pixel = o_in // channels
    o_channel = o_in - o_pixel * channels
    o_y = o_pixel // width
    o_x = o_pixel - o_y * width
    counter = ((o_channel.to(tl.int64) * height + o_y) * width + o_x).to(tl.uint32)  # logical NCHW order
    b_x = tl.load(p_x + i_image * size + o_in, mask=m, other=0.0).to(tl.float32) * tl.load(p_alpha)
    beta = tl.load(p_beta)
    seed = tl.load(p_seeds + i_image)
    t0, t1, l0, l1 = renoised_block(b_x, seed, counter, stage, spread * beta, common * beta)
    dtype = p_out.dtype.element_ty
    p_top = p_out + 4 * i_image * size + (4 * o_y.to(tl.int64) * width + 2 * o_x) * channels + o_channel
    p_low = p_top + 2 * width * channels
    tl.store(p_top, t0.to(dtype), mask=m)
    tl.store(p_top + channels, t1.to(dtype), mask=m)
    tl.store(p_low, l0.to(dtype), mask=m)
    tl.store(p_low + channels, l1.to(dtype), mask=m)


def blocks_per_lane(dtype: torch.dtype) -> int:
    """2x2 blocks whose output rows fill 16 bytes."""
    return 16 // (2 * dtype.itemsize)


def renoise_upsample(x: Tensor, alpha: Tensor, beta: Tensor, seeds: Tensor, stage: int, correlation: float) -> Tensor:
    """Launch on x (B, C, H, W), contiguous or channels-last; returns (B, C, 2H, 2W) in the same dtype and order."""
    b, c, h, w = x.shape
    order = torch.contiguous_format if x.is_contiguous() else torch.channels_last
    out = torch.empty(b, c, 2 * h, 2 * w, dtype=x.dtype, device=x.device, memory_format=order)
    if out.numel() == 0:
        return out
    spread, common = correlation_factors(correlation)
    options = dict(num_warps=NUM_WARPS, enable_fp_fusion=True)
    if order is torch.channels_last:
        grid = (triton.cdiv(c * h * w, BLOCK), b)
        renoise_upsample_channels_last_kernel[grid](
            x, out, alpha, beta, seeds, stage, c, h, w, spread, common, BLOCK=BLOCK, **options
        )
    else:
        k = blocks_per_lane(x.dtype)
        grid = (triton.cdiv(c * h * triton.cdiv(w, k), BLOCK), b)
        renoise_upsample_kernel[grid](
            x, out, alpha, beta, seeds, stage, c * h, w, spread, common, K=k, BLOCK=BLOCK, **options
        )
    return out


AOT_CASES = (
    AotCase(
        "renoise_upsample_kernel",
        lambda itemsize: {"K": 16 // (2 * itemsize), "BLOCK": BLOCK},
        NUM_WARPS,
        outputs=lambda c: 4 * c["K"] * c["BLOCK"],
        types=NOISE_TYPES,
        within=("x",),
    ),
    AotCase(
        "renoise_upsample_channels_last_kernel",
        {"BLOCK": BLOCK},
        NUM_WARPS,
        outputs=lambda c: 4 * c["BLOCK"],
        types=NOISE_TYPES,
        within=("x",),
    ),
)
