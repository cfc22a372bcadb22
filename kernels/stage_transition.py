"""Euler step, nearest x2 and renoising of patch rows in one pass (see msdd_fast/ops/stage_transition.py).

Reads x and the velocities once and writes the output once; the noise is made in registers. One lane makes ``K``
horizontally adjacent 2x2 blocks. Since the patch is even, a block lies inside one fine token, and since K divides half
a patch, so do the lane's two output rows: one 16-byte store each at patch 8.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from msdd_fast.diffusion.noise import correlation_factors
from msdd_fast.kernels._aot import CHANNELS, NOISE_TYPES, PATCH, AotCase, float32
from msdd_fast.kernels._patches import end_of_stage, widest_run
from msdd_fast.kernels.renoise_upsample import blocks_per_lane, renoised_blocks

BLOCK = 128
NUM_WARPS = 4


@triton.jit(do_not_specialize=["stage", "grid"])
def stage_transition_kernel(
    p_x: tl.tensor,  # (N, B, C*P*P), contiguous
    p_v: tl.tensor,  # (N, B, C*P*P), contiguous features
    p_uncond: tl.tensor,  # like p_v; not read unless GUIDED
    p_out: tl.tensor,  # (4N, B, C*P*P), contiguous
    p_dt: tl.tensor,  # () fp32
    p_scale: tl.tensor,  # () fp32; not read unless GUIDED
    p_alpha: tl.tensor,  # () fp32
    p_beta: tl.tensor,  # () fp32
    p_seeds: tl.tensor,  # (B,) int64
    stage: tl.tensor,
    grid: tl.tensor,  # coarse tokens in a row and in a column
    stride_x: tl.tensor,  # from token to token; of the output, too
    stride_vn: tl.tensor,  # from token to token
    stride_vb: tl.tensor,  # from image to image
    stride_un: tl.tensor,
    stride_ub: tl.tensor,
    spread: tl.tensor,
    common: tl.tensor,
    CHANNELS: tl.constexpr,
    P: tl.constexpr,
    K: tl.constexpr,
    GUIDED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    FEATURES: tl.constexpr = CHANNELS * P * P
    LANES: tl.constexpr = FEATURES // K  # of one token
    RUNS: tl.constexpr = P // K  # of one line of a patch
    i_image = tl.program_id(1).to(tl.int64)
    o_lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK], within an image: fits in 32 bits
    o_token = o_lane // LANES
    o_run = o_lane - o_token * LANES  # in the token's memory order: (channel, line, run)
    m_in = (o_token < grid * grid)[:, None] & (tl.arange(0, K) < K)[None, :]
    o_in = (o_run * K)[:, None] + tl.arange(0, K)[None, :]
    n = o_token.to(tl.int64)[:, None]
    b_x = end_of_stage(
        *(p_x, p_v, p_uncond, p_dt, p_scale),
        *(n * stride_x + i_image * FEATURES + o_in, n * stride_vn + i_image * stride_vb + o_in),
        *(n * stride_un + i_image * stride_ub + o_in, m_in, GUIDED),
    )  # [BLOCK, K]
    b_x = b_x * tl.load(p_alpha)
    beta = tl.load(p_beta)
    spread, common = spread * beta, common * beta
    seed = tl.load(p_seeds + i_image)

    o_channel = o_run // (P * RUNS)
    o_line = o_run // RUNS % P
    o_piece = o_run % RUNS
    o_y = o_token // grid
    o_x = o_token - o_y * grid
    side = grid * P
    counter = ((o_channel * side + o_y * P + o_line) * side + o_x * P + o_piece * K).to(tl.uint32)
    b_top, b_low = renoised_blocks(b_x, seed, counter, stage, spread, common, K, BLOCK)

    # Line 2 * line of 2P, piece 2K * piece of 2P: which half says which of the four fine tokens.
    HALF: tl.constexpr = P // 2
    o_fine_y = 2 * o_y + o_line // HALF
    o_fine_x = 2 * o_x + o_piece // (RUNS // 2)
    n = (o_fine_y * 2 * grid + o_fine_x).to(tl.int64)
    o_feature = (o_channel * P + o_line % HALF * 2) * P + o_piece % (RUNS // 2) * (2 * K)
    m_out = (o_token < grid * grid)[:, None] & (tl.arange(0, 2 * K) < 2 * K)[None, :]
    p_top = p_out + (n * stride_x + i_image * FEATURES + o_feature)[:, None] + tl.arange(0, 2 * K)[None, :]
    tl.store(p_top, b_top.to(p_out.dtype.element_ty), mask=m_out)
    tl.store(p_top + P, b_low.to(p_out.dtype.element_ty), mask=m_out)


def stage_transition(
    x: Tensor,
    v: Tensor,
    dt: Tensor,
    alpha: Tensor,
    beta: Tensor,
    seeds: Tensor,
    stage: int,
    patch_size: int,
    correlation: float,
    v_uncond: Tensor | None,
    scale: Tensor | None,
) -> Tensor:
    """Launch on contiguous x (N, B, C*p*p) and velocities with contiguous features; returns (4N, B, C*p*p)."""
    tokens, batch, features = x.shape
    out = torch.empty(4 * tokens, batch, features, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    guided = v_uncond is not None
    uncond = v if v_uncond is None else v_uncond  # not read unless guided, nor is the scale
    scale = dt if scale is None else scale
    k = widest_run(patch_size // 2, blocks_per_lane(x.dtype))
    stage_transition_kernel[(triton.cdiv(tokens * features // k, BLOCK), batch)](
        *(x, v, uncond, out, dt, scale, alpha, beta, seeds, stage, math.isqrt(tokens), batch * features),
        *(*v.stride()[:2], *uncond.stride()[:2], *correlation_factors(correlation)),
        CHANNELS=features // patch_size**2,
        P=patch_size,
        K=k,
        GUIDED=guided,
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
        enable_fp_fusion=True,
    )
    return out


AOT_CASES = tuple(
    AotCase(
        "stage_transition_kernel",
        lambda itemsize, guided=guided: {  # type: ignore[misc]
            **{"CHANNELS": CHANNELS, "P": PATCH, "K": 16 // (2 * itemsize), "GUIDED": guided, "BLOCK": BLOCK}
        },
        NUM_WARPS,
        outputs=lambda c: 4 * c["K"] * c["BLOCK"],
        types={**NOISE_TYPES, **float32("dt", "scale")},
        variant="guided" if guided else "",
        within=("x",),
    )
    for guided in (False, True)
)
