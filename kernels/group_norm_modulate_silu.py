"""GroupNorm, affine, modulation by cells of a lower resolution and SiLU (ops/group_norm_modulate_silu.py).

Three kernels. Each program of the first takes tiles of pixels x channels, computes mean and squared deviations of every
channel in registers, and merges its tiles. The second merges the programs and channels of a group. The third writes the
result. x is read by its strides, so both memory orders share the code.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from msdd_fast.kernels._aot import AotCase, float32

PIXELS, CHANNELS = 64, 32
NUM_WARPS = 4
TILES = 8  # of one program of the first kernel, at least
MAX_PARTS = 256
MERGE = 64
MERGE_WARPS = 4


@triton.jit
def group_norm_parts_kernel(
    p_x: tl.tensor,  # (B, C, pixels)
    p_mean: tl.tensor,  # (B, parts, C) fp32: mean of a part's pixels
    p_squares: tl.tensor,  # (B, parts, C) fp32: sum of the squares about it
    pixels: tl.tensor,
    parts: tl.tensor,
    tiles: tl.tensor,  # of a part
    stride_x: tl.tensor,  # between images
    stride_c: tl.tensor,  # between channels, and between pixels
    stride_p: tl.tensor,
    WIDTH: tl.constexpr,  # C
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
) -> None:
    i_image = tl.program_id(2).to(tl.int64)
    i_part = tl.program_id(0).to(tl.int64)
    o_c = tl.program_id(1).to(tl.int64) * CHANNELS + tl.arange(0, CHANNELS)
    m_c = o_c < WIDTH
    p_image = p_x + i_image * stride_x + o_c[None, :] * stride_c
    b_mean = tl.zeros([CHANNELS], dtype=tl.float32)
    b_squares = tl.zeros([CHANNELS], dtype=tl.float32)
    b_count = 0.0
    for i in range(tiles):
        o_p = (i_part * tiles + i) * PIXELS + tl.arange(0, PIXELS)
        m = (o_p < pixels)[:, None] & m_c[None, :]
        b_x = tl.load(p_image + o_p[:, None] * stride_p, mask=m, other=0.0).to(tl.float32)  # [PIXELS, CHANNELS]
        b_here = tl.sum((o_p < pixels).to(tl.float32), axis=0)  # 0 past the end
        b_tile_mean = tl.sum(b_x, axis=0) / tl.maximum(b_here, 1.0)
        b_centred = tl.where(m, b_x - b_tile_mean[None, :], 0.0)
        b_apart = b_tile_mean - b_mean
        b_share = b_here / tl.maximum(b_count + b_here, 1.0)
        b_squares += tl.sum(b_centred * b_centred, axis=0) + b_apart * b_apart * (b_count * b_share)
        b_mean += b_apart * b_share
        b_count += b_here
    o = (i_image * parts + i_part) * WIDTH + o_c
    tl.store(p_mean + o, b_mean, mask=m_c)
    tl.store(p_squares + o, b_squares, mask=m_c)


@triton.jit
def group_norm_merge_kernel(
    p_mean: tl.tensor,  # (B, parts, C) fp32
    p_squares: tl.tensor,  # (B, parts, C) fp32
    p_norm: tl.tensor,  # (B, groups, 2) fp32: mean and 1 / sqrt(variance + EPS)
    pixels: tl.tensor,
    parts: tl.tensor,
    part_pixels: tl.tensor,  # of a whole part
    groups: tl.tensor,
    EPS: tl.constexpr,
    PARTS: tl.constexpr,  # power of 2, at least parts
    PER_GROUP: tl.constexpr,  # C / groups
    BLOCK: tl.constexpr,  # power of 2, at least PER_GROUP
    MERGE: tl.constexpr,
) -> None:
    i_image = tl.program_id(1).to(tl.int64)
    i_group = tl.program_id(0)
    o_c = tl.arange(0, BLOCK)
    b_sum = tl.zeros([BLOCK], dtype=tl.float32)
    o_first = i_image * parts * (groups * PER_GROUP) + i_group * PER_GROUP + o_c[None, :]
    for begin in range(0, PARTS, MERGE):
        o_part = begin + tl.arange(0, MERGE)
        m = (o_part < parts)[:, None] & (o_c < PER_GROUP)[None, :]
        o = o_first + o_part.to(tl.int64)[:, None] * (groups * PER_GROUP)
        b_count = tl.minimum(tl.maximum(pixels - o_part * part_pixels, 0), part_pixels).to(tl.float32)
        b_mean = tl.load(p_mean + o, mask=m, other=0.0)  # [MERGE, BLOCK]
        b_sum += tl.sum(b_mean * (b_count / pixels)[:, None], axis=0)
    b_common = tl.sum(b_sum, axis=0) / PER_GROUP
    b_squares = tl.zeros([BLOCK], dtype=tl.float32)
    for begin in range(0, PARTS, MERGE):
        o_part = begin + tl.arange(0, MERGE)
        m = (o_part < parts)[:, None] & (o_c < PER_GROUP)[None, :]
        o = o_first + o_part.to(tl.int64)[:, None] * (groups * PER_GROUP)
        b_count = tl.minimum(tl.maximum(pixels - o_part * part_pixels, 0), part_pixels).to(tl.float32)
        b_apart = tl.where(m, tl.load(p_mean + o, mask=m, other=0.0) - b_common, 0.0)  # [MERGE, BLOCK]
        b_here = tl.load(p_squares + o, mask=m, other=0.0)  # [MERGE, BLOCK]
        b_squares += tl.sum(b_here + b_apart * b_apart * b_count[:, None], axis=0)
    b_var = tl.sum(b_squares, axis=0) / (PER_GROUP * (1.0 * pixels))
    p_out = p_norm + (i_image * groups + i_group) * 2
    tl.store(p_out, b_common)
    tl.store(p_out + 1, tl.rsqrt(b_var + EPS))


@triton.jit
def group_norm_apply_kernel(
    p_x: tl.tensor,  # (B, C, pixels)
    p_norm: tl.tensor,  # (B, groups, 2) fp32
    p_weight: tl.tensor,  # (C,) or anything
    p_bias: tl.tensor,  # (C,) or anything
    p_scale: tl.tensor,  # (B, C, cells by cells) or anything
    p_shift: tl.tensor,  # the same
    p_out: tl.tensor,  # (B, C, pixels), strides of x
    pixels: tl.tensor,
    width: tl.tensor,  # of the image
    groups: tl.tensor,
    cell_height: tl.tensor,  # of a cell, in pixels
    cell_width: tl.tensor,
    stride_x: tl.tensor,  # between images, channels and pixels of x
    stride_c: tl.tensor,
    stride_p: tl.tensor,
    stride_sb: tl.tensor,  # between images, channels, rows and columns of scale
    stride_sc: tl.tensor,
    stride_sy: tl.tensor,
    stride_sx: tl.tensor,
    stride_tb: tl.tensor,  # of shift
    stride_tc: tl.tensor,
    stride_ty: tl.tensor,
    stride_tx: tl.tensor,
    PER_GROUP: tl.constexpr,  # C / groups
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    MODULATE: tl.constexpr,
    SILU: tl.constexpr,
    WIDTH: tl.constexpr,  # C
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
) -> None:
    i_image = tl.program_id(2).to(tl.int64)
    o_p = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    o_c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    m_c = o_c < WIDTH
    m = (o_p < pixels)[:, None] & m_c[None, :]
    p_group = p_norm + (i_image * groups + o_c // PER_GROUP) * 2
    b_mean = tl.load(p_group, mask=m_c, other=0.0)  # [CHANNELS]
    b_factor = tl.load(p_group + 1, mask=m_c, other=0.0)  # [CHANNELS]
    if WEIGHT:
        b_factor *= tl.load(p_weight + o_c, mask=m_c, other=0.0).to(tl.float32)  # [CHANNELS]
    o = i_image * stride_x + o_c.to(tl.int64)[None, :] * stride_c + o_p.to(tl.int64)[:, None] * stride_p
    b_x = tl.load(p_x + o, mask=m, other=0.0).to(tl.float32)  # [PIXELS, CHANNELS]
    b_y = (b_x - b_mean[None, :]) * b_factor[None, :]
    if BIAS:
        b_y += tl.load(p_bias + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]  # [1, CHANNELS]
    if MODULATE:
        o_y = (o_p // width // cell_height).to(tl.int64)[:, None]
        o_x = (o_p % width // cell_width).to(tl.int64)[:, None]
        o_wide = o_c.to(tl.int64)[None, :]
        o_s = i_image * stride_sb + o_wide * stride_sc + o_y * stride_sy + o_x * stride_sx
        b_scale = tl.load(p_scale + o_s, mask=m, other=0.0).to(tl.float32)  # [PIXELS, CHANNELS]
        o_t = i_image * stride_tb + o_wide * stride_tc + o_y * stride_ty + o_x * stride_tx
        b_shift = tl.load(p_shift + o_t, mask=m, other=0.0).to(tl.float32)  # [PIXELS, CHANNELS]
        b_y = b_y * (1.0 + b_scale) + b_shift
    if SILU:
        b_y = b_y / (1.0 + tl.exp(-b_y))
    tl.store(p_out + o, b_y.to(p_out.dtype.element_ty), mask=m)


def split(pixels: int) -> tuple[int, int]:
    """(parts, tiles of a part) for the first kernel: TILES tiles a part, more in large images."""
    tiles = max(TILES, triton.cdiv(pixels, PIXELS * MAX_PARTS))
    return triton.cdiv(pixels, PIXELS * tiles), tiles


def group_norm_modulate_silu(
    x: Tensor,
    groups: int,
    eps: float,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    silu: bool,
) -> Tensor:
    """Launch on x (B, C, H, W), contiguous or channels-last, and tables (B, C, h, w) with any strides."""
    out = torch.empty_like(x)
    if out.numel() == 0:
        return out
    b, c, height, width = x.shape
    pixels, per_group = height * width, c // groups
    parts, tiles = split(pixels)
    mean, squares = torch.empty(2, b, parts, c, dtype=torch.float32, device=x.device)
    norm = torch.empty(b, groups, 2, dtype=torch.float32, device=x.device)
    # In either memory order a pixel's number times this is its place.
    strides = (x.stride(0), x.stride(1), x.stride(3) if width > 1 else (1 if x.is_contiguous() else c))
    tile = dict(WIDTH=c, PIXELS=PIXELS, CHANNELS=CHANNELS, num_warps=NUM_WARPS, enable_fp_fusion=True)
    group_norm_parts_kernel[(parts, triton.cdiv(c, CHANNELS), b)](
        x, mean, squares, pixels, parts, tiles, *strides, **tile
    )
    group_norm_merge_kernel[(groups, b)](
        *(mean, squares, norm, pixels, parts, tiles * PIXELS, groups),
        **dict(EPS=eps, PARTS=triton.next_power_of_2(parts), PER_GROUP=per_group),
        **dict(BLOCK=triton.next_power_of_2(per_group), MERGE=MERGE, num_warps=MERGE_WARPS, enable_fp_fusion=True),
    )
    cells = (1, 1) if scale is None else scale.shape[2:]
    tables = [x if t is None else t for t in (weight, bias, scale, shift)]
    table_strides = [s for t in (scale, shift) for s in ((0, 0, 0, 0) if t is None else t.stride())]
    group_norm_apply_kernel[(triton.cdiv(pixels, PIXELS), triton.cdiv(c, CHANNELS), b)](
        *(x, norm, *tables, out, pixels, width, groups, height // cells[0], width // cells[1]),
        *(*strides, *table_strides),
        **dict(
            PER_GROUP=per_group, WEIGHT=weight is not None, BIAS=bias is not None, MODULATE=scale is not None, SILU=silu
        ),
        **tile,
    )
    return out


# Channels-last maps with 64 channels, as at SSDD's finest level.
_TILE = {"WIDTH": 64, "PIXELS": PIXELS, "CHANNELS": CHANNELS, "stride_c": 1}
AOT_CASES = (
    AotCase(
        "group_norm_parts_kernel",
        _TILE,
        NUM_WARPS,
        outputs=lambda c: c["PIXELS"] * c["CHANNELS"],
        types=float32("mean", "squares"),
        variant="channels-last",
    ),
    AotCase(
        "group_norm_merge_kernel",
        {"EPS": 1e-5, "PARTS": 128, "PER_GROUP": 2, "BLOCK": 2, "MERGE": MERGE},
        MERGE_WARPS,
        outputs=lambda c: c["PARTS"] * c["BLOCK"],
        types=float32("mean", "squares", "norm"),
        within=("x",),
    ),
    AotCase(
        "group_norm_apply_kernel",
        {
            **{**_TILE, "stride_sc": 1, "stride_tc": 1},
            **{"PER_GROUP": 2, "WEIGHT": False, "BIAS": False, "MODULATE": True, "SILU": True},
        },
        NUM_WARPS,
        outputs=lambda c: c["PIXELS"] * c["CHANNELS"],
        types=float32("norm"),
        variant="channels-last",
        within=("x", "y"),
    ),
)
