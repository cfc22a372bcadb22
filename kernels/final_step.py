"""The last Euler step, from patch rows to the image, in one pass (see msdd_fast/ops/final_step.py)."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from msdd_fast.kernels._aot import CHANNELS, PATCH, AotCase, float32
from msdd_fast.kernels._patches import end_of_stage, widest_run

BLOCK = 128
BLOCK_LAST = 256
NUM_WARPS = 4


@triton.jit
def to_pixels(x: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """fp32 to the image's dtype; to uint8 as ``to_uint8`` (ops/_patches.py), with 0 for NaN."""
    if dtype == tl.uint8:
        x = tl.minimum(tl.maximum(x * 127.5 + 128.0, 0.0), 255.0).to(tl.int32)
    return x.to(dtype)


@triton.jit(do_not_specialize=["grid"])
def final_step_kernel(
    p_x: tl.tensor,  # (N, B, C*P*P), contiguous
    p_v: tl.tensor,  # (N, B, C*P*P), contiguous features
    p_uncond: tl.tensor,  # like p_v; not read unless GUIDED
    p_out: tl.tensor,  # (B, C, grid*P, grid*P)
    p_dt: tl.tensor,  # () fp32
    p_scale: tl.tensor,  # () fp32; not read unless GUIDED
    grid: tl.tensor,  # tokens in a row and in a column
    stride_x: tl.tensor,  # from token to token
    stride_vn: tl.tensor,  # from token to token
    stride_vb: tl.tensor,  # from image to image
    stride_un: tl.tensor,
    stride_ub: tl.tensor,
    CHANNELS: tl.constexpr,
    P: tl.constexpr,
    K: tl.constexpr,
    SPAN: tl.constexpr,
    GUIDED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One lane moves K pixels of a line of a patch.

    Neighbouring lanes make the P lines of SPAN neighbouring patches, so that a warp reads whole sectors of a token and
    writes whole sectors of an image line.
    """
    FEATURES: tl.constexpr = CHANNELS * P * P
    RUNS: tl.constexpr = P // K  # of one line of a patch
    i_image = tl.program_id(1).to(tl.int64)
    o_lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK], within an image: fits in 32 bits
    o_run = o_lane % RUNS
    o_token = o_lane // RUNS % SPAN
    o_line = o_lane // (RUNS * SPAN) % P
    o_rest = o_lane // (RUNS * SPAN * P)  # (token row, channel, group of SPAN tokens)
    groups = tl.cdiv(grid, SPAN)
    o_group = o_rest % groups
    o_channel = o_rest // groups % CHANNELS
    o_y = o_rest // (groups * CHANNELS)
    o_x = o_group * SPAN + o_token
    m = ((o_y < grid) & (o_x < grid))[:, None] & (tl.arange(0, K) < K)[None, :]
    o_in = ((o_channel * P + o_line) * P + o_run * K)[:, None] + tl.arange(0, K)[None, :]
    n = (o_y * grid + o_x).to(tl.int64)[:, None]
    b_x = end_of_stage(
        *(p_x, p_v, p_uncond, p_dt, p_scale),
        *(n * stride_x + i_image * FEATURES + o_in, n * stride_vn + i_image * stride_vb + o_in),
        *(n * stride_un + i_image * stride_ub + o_in, m, GUIDED),
    )  # [BLOCK, K]
    side = grid * P
    o_out = (o_channel * side + o_y * P + o_line) * side + o_x * P + o_run * K
    p_image = p_out + i_image * CHANNELS * side * side
    tl.store(p_image + o_out[:, None] + tl.arange(0, K)[None, :], to_pixels(b_x, p_out.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=["grid"])
def final_step_channels_last_kernel(
    p_x: tl.tensor,  # (N, B, C*P*P), contiguous
    p_v: tl.tensor,  # (N, B, C*P*P), contiguous features
    p_uncond: tl.tensor,  # like p_v; not read unless GUIDED
    p_out: tl.tensor,  # (B, grid*P, grid*P, C)
    p_dt: tl.tensor,  # () fp32
    p_scale: tl.tensor,  # () fp32; not read unless GUIDED
    grid: tl.tensor,  # tokens in a row and in a column
    stride_x: tl.tensor,  # from token to token
    stride_vn: tl.tensor,  # from token to token
    stride_vb: tl.tensor,  # from image to image
    stride_un: tl.tensor,
    stride_ub: tl.tensor,
    CHANNELS: tl.constexpr,
    P: tl.constexpr,
    GUIDED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One element per lane, in the order of the output; the scattered reads of a warp share their sectors."""
    FEATURES: tl.constexpr = CHANNELS * P * P
    i_image = tl.program_id(1).to(tl.int64)
    o_out = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK], within an image: fits in 32 bits
    side = grid * P
    size = CHANNELS * side * side
    m = o_out < size
    o_pixel = o_out // CHANNELS
    o_channel = o_out - o_pixel * CHANNELS
    o_y = o_pixel // side
    o_x = o_pixel - o_y * side
    o_in = (o_channel * P + o_y % P) * P + o_x % P
    n = (o_y // P * grid + o_x // P).to(tl.int64)
    b_x = end_of_stage(
        *(p_x, p_v, p_uncond, p_dt, p_scale),
        *(n * stride_x + i_image * FEATURES + o_in, n * stride_vn + i_image * stride_vb + o_in),
        *(n * stride_un + i_image * stride_ub + o_in, m, GUIDED),
    )  # [BLOCK]
    tl.store(p_out + i_image * size + o_out, to_pixels(b_x, p_out.dtype.element_ty), mask=m)


def final_step(
    x: Tensor,
    v: Tensor,
    dt: Tensor,
    patch_size: int,
    out_dtype: torch.dtype,
    v_uncond: Tensor | None,
    scale: Tensor | None,
    channels_last: bool,
) -> Tensor:
    """Launch on contiguous x (N, B, C*p*p) and velocities with contiguous features; returns (B, C, H, H)."""
    tokens, batch, features = x.shape
    grid, channels = math.isqrt(tokens), features // patch_size**2
    side = grid * patch_size
    order = torch.channels_last if channels_last else torch.contiguous_format
    out = torch.empty(batch, channels, side, side, dtype=out_dtype, device=x.device, memory_format=order)
    if out.numel() == 0:
        return out
    guided = v_uncond is not None
    uncond = v if v_uncond is None else v_uncond  # not read unless guided, nor is the scale
    scale = dt if scale is None else scale
    arguments = (x, v, uncond, out, dt, scale, grid, batch * features, *v.stride()[:2], *uncond.stride()[:2])
    options = dict(CHANNELS=channels, P=patch_size, GUIDED=guided, num_warps=NUM_WARPS, enable_fp_fusion=True)
    if channels_last:
        programs = (triton.cdiv(channels * side * side, BLOCK_LAST), batch)
        final_step_channels_last_kernel[programs](*arguments, BLOCK=BLOCK_LAST, **options)
    else:
        k, span = run_and_span(patch_size, out_dtype.itemsize)
        lanes = grid * channels * triton.cdiv(grid, span) * span * patch_size * (patch_size // k)
        final_step_kernel[(triton.cdiv(lanes, BLOCK), batch)](*arguments, K=k, SPAN=span, BLOCK=BLOCK, **options)
    return out


def run_and_span(patch_size: int, itemsize: int) -> tuple[int, int]:
    """Pixels of a lane, which fill at most 16 bytes of the output, and patches side by side in 64 bytes of a line."""
    return widest_run(patch_size, 16 // itemsize), max(1, 64 // (patch_size * itemsize))


def _constants(itemsize: int) -> dict[str, int]:
    """For an output of ``itemsize`` bytes an element."""
    k, span = run_and_span(PATCH, itemsize)
    return {"CHANNELS": CHANNELS, "P": PATCH, "K": k, "SPAN": span, "GUIDED": True, "BLOCK": BLOCK}


AOT_CASES = (
    AotCase(
        "final_step_kernel",
        _constants,
        NUM_WARPS,
        outputs=lambda c: c["K"] * c["BLOCK"],
        types=float32("dt", "scale"),
        variant="guided",
        within=("x",),
    ),
    AotCase(
        "final_step_kernel",
        _constants(1),
        NUM_WARPS,
        outputs=lambda c: c["K"] * c["BLOCK"],
        types={**float32("dt", "scale"), "p_out": "*u8"},
        variant="guided, to uint8",
        within=("x",),
    ),
    AotCase(
        "final_step_channels_last_kernel",
        {"CHANNELS": CHANNELS, "P": PATCH, "GUIDED": True, "BLOCK": BLOCK_LAST},
        NUM_WARPS,
        outputs=lambda c: c["BLOCK"],
        types=float32("dt", "scale"),
        variant="guided",
        within=("x",),
    ),
)
