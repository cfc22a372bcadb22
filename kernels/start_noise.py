"""White unit normals straight into the state: one write, no read (see msdd_fast/ops/start_noise.py)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from msdd_fast.kernels._aot import CHANNELS, PATCH, AotCase
from msdd_fast.kernels._noise import PURPOSE_START, block_normals, interleave2, interleave4
from msdd_fast.kernels._patches import widest_run
from msdd_fast.kernels.renoise_upsample import blocks_per_lane

BLOCK = 128
NUM_WARPS = 4


@triton.jit
def start_noise_kernel(
    p_out: tl.tensor,  # (B, C*2H, 2W)
    p_seeds: tl.tensor,  # (B,) int64
    rows: tl.tensor,  # C*H
    width: tl.tensor,  # W
    K: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    i_image = tl.program_id(1).to(tl.int64)
    groups = tl.cdiv(width, K)
    o_group = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # within an image: fits in 32 bits
    o_row = o_group // groups  # [BLOCK]
    o_col = (o_group - o_row * groups) * K
    o_row = o_row.to(tl.int64)
    seed = tl.load(p_seeds + i_image)
    counter = (o_row * width + o_col).to(tl.uint32)
    b_top, b_low = white_blocks(seed, counter, 0, PURPOSE_START, K)
    o_wide = tl.arange(0, 2 * K)[None, :]
    m_out = (o_row < rows)[:, None] & (2 * o_col[:, None] + o_wide < 2 * width)
    p_top = p_out + 4 * i_image * rows * width + (4 * o_row * width + 2 * o_col)[:, None] + o_wide
    tl.store(p_top, b_top.reshape(BLOCK, 2 * K).to(p_out.dtype.element_ty), mask=m_out)
    tl.store(p_top + 2 * width, b_low.reshape(BLOCK, 2 * K).to(p_out.dtype.element_ty), mask=m_out)


@triton.jit
def start_noise_rows_kernel(
    p_out: tl.tensor,  # (N, B, C*P*P)
    p_seeds: tl.tensor,  # (B,) int64
    grid_y: tl.tensor,  # tokens in a column
    grid_x: tl.tensor,  # tokens in a row
    stride_out: tl.tensor,  # from token to token
    CHANNELS: tl.constexpr,
    P: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """The same numbers as patch rows: a lane makes K blocks of one token."""
    HALF: tl.constexpr = P // 2
    RUNS: tl.constexpr = HALF // K  # of one line of blocks
    i_image = tl.program_id(1).to(tl.int64)
    o_lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK], within an image: fits in 32 bits
    o_run = o_lane % RUNS
    o_line = o_lane // RUNS % HALF
    o_channel = o_lane // (RUNS * HALF) % CHANNELS
    o_token = o_lane // (RUNS * HALF * CHANNELS)
    o_y = o_token // grid_x
    o_x = o_token - o_y * grid_x
    counter = ((o_channel * grid_y + o_y) * HALF + o_line) * (grid_x * HALF) + o_x * HALF + o_run * K
    b_top, b_low = white_blocks(tl.load(p_seeds + i_image), counter.to(tl.uint32), 0, PURPOSE_START, K)
    o_wide = tl.arange(0, 2 * K)[None, :]
    m_out = (o_token < grid_y * grid_x)[:, None] & (o_wide < 2 * K)
    o_feature = (o_channel * P + 2 * o_line) * P + o_run * (2 * K)
    o_top = o_token.to(tl.int64) * stride_out + i_image * (CHANNELS * P * P) + o_feature
    p_top = p_out + o_top[:, None] + o_wide
    tl.store(p_top, b_top.reshape(BLOCK, 2 * K).to(p_out.dtype.element_ty), mask=m_out)
    tl.store(p_top + P, b_low.reshape(BLOCK, 2 * K).to(p_out.dtype.element_ty), mask=m_out)


@triton.jit
def white_blocks(
    seed: tl.tensor, counter: tl.tensor, stage: tl.tensor, PURPOSE: tl.constexpr, K: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Upper and lower line of K neighbouring blocks per lane, counters [BLOCK] of the first: 2K pixels each."""
    if K == 1:
        t00, t01, l00, l01 = block_normals(seed, counter, stage, PURPOSE)
        b_top = tl.join(t00, t01)
        b_low = tl.join(l00, l01)
    elif K == 2:
        t00, t01, l00, l01 = block_normals(seed, counter, stage, PURPOSE)
        t10, t11, l10, l11 = block_normals(seed, counter + 1, stage, PURPOSE)
        b_top = interleave2(t00, t01, t10, t11)
        b_low = interleave2(l00, l01, l10, l11)
    else:
        t00, t01, l00, l01 = block_normals(seed, counter, stage, PURPOSE)
        t10, t11, l10, l11 = block_normals(seed, counter + 1, stage, PURPOSE)
        t20, t21, l20, l21 = block_normals(seed, counter + 2, stage, PURPOSE)
        t30, t31, l30, l31 = block_normals(seed, counter + 3, stage, PURPOSE)
        b_top = interleave4(t00, t01, t10, t11, t20, t21, t30, t31)
        b_low = interleave4(l00, l01, l10, l11, l20, l21, l30, l31)
    return b_top, b_low


def start_noise(
    seeds: Tensor, channels: int, height: int, width: int, dtype: torch.dtype, patch_size: int | None
) -> Tensor:
    """Launch; returns (B, C, H, W), or patch rows (N, B, C*p*p), on the device of the seeds."""
    options = dict(BLOCK=BLOCK, num_warps=NUM_WARPS, enable_fp_fusion=True)
    if patch_size is not None:
        p, batch = patch_size, len(seeds)
        out = torch.empty((height // p) * (width // p), batch, channels * p * p, dtype=dtype, device=seeds.device)
        if out.numel() > 0:
            k = widest_run(p // 2, blocks_per_lane(dtype))
            grid = (triton.cdiv(out[:, 0].numel() // (4 * k), BLOCK), batch)
            sizes = (height // p, width // p, batch * channels * p * p)
            start_noise_rows_kernel[grid](out, seeds, *sizes, CHANNELS=channels, P=p, K=k, **options)
        return out
    out = torch.empty(len(seeds), channels, height, width, dtype=dtype, device=seeds.device)
    if out.numel() == 0:
        return out
    k = blocks_per_lane(dtype)
    h, w = height // 2, width // 2
    grid = (triton.cdiv(channels * h * triton.cdiv(w, k), BLOCK), len(seeds))
    start_noise_kernel[grid](out, seeds, channels * h, w, K=k, **options)
    return out


def _blocks(itemsize: int) -> dict[str, int]:
    return {"K": 16 // (2 * itemsize), "BLOCK": BLOCK}


AOT_CASES = (
    AotCase(
        "start_noise_kernel",
        _blocks,
        NUM_WARPS,
        outputs=lambda c: 4 * c["K"] * c["BLOCK"],
        types={"p_seeds": "*i64"},
        within=("x",),
    ),
    AotCase(
        "start_noise_rows_kernel",
        lambda itemsize: {"CHANNELS": CHANNELS, "P": PATCH, **_blocks(itemsize)},
        NUM_WARPS,
        outputs=lambda c: 4 * c["K"] * c["BLOCK"],
        types={"p_seeds": "*i64"},
        within=("x",),
    ),
)
