"""White unit normals straight into the state: one write, no read (see msdd_fast/ops/start_noise.py)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from msdd_fast.kernels._noise import PURPOSE_START, block_normals, interleave2, interleave4
from msdd_fast.kernels.renoise_upsample import blocks_per_lane

BLOCK = 128
NUM_WARPS = 4


@triton.jit
def start_noise_kernel(
    p_out,  # (B, C*2H, 2W)
    p_seeds,  # (B,) int64
    rows,  # C*H
    width,  # W
    K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_image = tl.program_id(1).to(tl.int64)
    groups = tl.cdiv(width, K)
    o_group = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # within an image: fits in 32 bits
    o_row = o_group // groups  # [BLOCK]
    o_col = (o_group - o_row * groups) * K
    o_row = o_row.to(tl.int64)
    seed = tl.load(p_seeds + i_image)
    counter = (o_row * width + o_col).to(tl.uint32)
    if K == 2:
        t00, t01, l00, l01 = block_normals(seed, counter, 0, PURPOSE_START)
        t10, t11, l10, l11 = block_normals(seed, counter + 1, 0, PURPOSE_START)
        b_top = interleave2(t00, t01, t10, t11)
        b_low = interleave2(l00, l01, l10, l11)
    else:
        t00, t01, l00, l01 = block_normals(seed, counter, 0, PURPOSE_START)
        t10, t11, l10, l11 = block_normals(seed, counter + 1, 0, PURPOSE_START)
        t20, t21, l20, l21 = block_normals(seed, counter + 2, 0, PURPOSE_START)
        t30, t31, l30, l31 = block_normals(seed, counter + 3, 0, PURPOSE_START)
        b_top = interleave4(t00, t01, t10, t11, t20, t21, t30, t31)
        b_low = interleave4(l00, l01, l10, l11, l20, l21, l30, l31)
    o_wide = tl.arange(0, 2 * K)[None, :]
    m_out = (o_row < rows)[:, None] & (2 * o_col[:, None] + o_wide < 2 * width)
    p_top = p_out + 4 * i_image * rows * width + (4 * o_row * width + 2 * o_col)[:, None] + o_wide
    tl.store(p_top, b_top.reshape(BLOCK, 2 * K).to(p_out.dtype.element_ty), mask=m_out)
    tl.store(p_top + 2 * width, b_low.reshape(BLOCK, 2 * K).to(p_out.dtype.element_ty), mask=m_out)


def start_noise(seeds: Tensor, channels: int, height: int, width: int, dtype: torch.dtype) -> Tensor:
    """Launch; returns (B, C, H, W) on the device of the seeds."""
    out = torch.empty(len(seeds), channels, height, width, dtype=dtype, device=seeds.device)
    if out.numel() == 0:
        return out
    k = blocks_per_lane(dtype)
    h, w = height // 2, width // 2
    grid = (triton.cdiv(channels * h * triton.cdiv(w, k), BLOCK), len(seeds))
    start_noise_kernel[grid](out, seeds, channels * h, w, K=k, BLOCK=BLOCK, num_warps=NUM_WARPS, enable_fp_fusion=True)
    return out
