"""Attention of every pixel over the window around it, with a bias by displacement (ops/window_attention.py).

A program takes a tile of TILE_Y x TILE_X queries of one image and head and loops in blocks over the keys that any of
them sees, (TILE_Y + 2w - 2) x (TILE_X + 2w - 2). The softmax is online (running maximum and sum). Head sizes are padded
to a power of two by masks.
"""

from __future__ import annotations

import math
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from msdd_fast.kernels._aot import AotCase, float32

TILE_Y, TILE_X = 4, 8
BLOCK_K = 64
NUM_WARPS = 4


@triton.jit
def window_attention_kernel(
    p_q: tl.tensor,  # (B, height * width, H, SIZE)
    p_k: tl.tensor,  # the same
    p_v: tl.tensor,  # the same
    p_table: tl.tensor,  # (2 WINDOW - 1, 2 WINDOW - 1, H)
    p_out: tl.tensor,  # (B, height * width, H, SIZE)
    heads: tl.tensor,  # H
    height: tl.tensor,
    width: tl.tensor,
    stride_qb: tl.tensor,  # strides in elements of image, token and head; that of SIZE is 1
    stride_qn: tl.tensor,
    stride_qh: tl.tensor,
    stride_kb: tl.tensor,
    stride_kn: tl.tensor,
    stride_kh: tl.tensor,
    stride_vb: tl.tensor,
    stride_vn: tl.tensor,
    stride_vh: tl.tensor,
    stride_ty: tl.tensor,
    stride_tx: tl.tensor,
    stride_th: tl.tensor,
    stride_ob: tl.tensor,
    stride_on: tl.tensor,
    stride_oh: tl.tensor,
    SCALE: tl.constexpr,  # 1 / sqrt(SIZE)
    WIDEN: tl.constexpr,  # for the interpreter, which multiplies the bits of bfloat16
    WINDOW: tl.constexpr,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,  # power of 2, at least SIZE and 16
    TILE_Y: tl.constexpr,
    TILE_X: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    QUERIES: tl.constexpr = TILE_Y * TILE_X
    REACH: tl.constexpr = WINDOW - 1
    SEEN_X: tl.constexpr = TILE_X + 2 * REACH
    SEEN: tl.constexpr = (TILE_Y + 2 * REACH) * SEEN_X
    tiles_x = tl.cdiv(width, TILE_X)
    i_tile = tl.program_id(0)
    i_head = tl.program_id(1).to(tl.int64)
    i_image = tl.program_id(2).to(tl.int64)
    first_y = i_tile // tiles_x * TILE_Y
    first_x = i_tile % tiles_x * TILE_X

    o_q = tl.arange(0, QUERIES)
    o_qy, o_qx = first_y + o_q // TILE_X, first_x + o_q % TILE_X
    o_d = tl.arange(0, PADDED)
    m_d = (o_d < SIZE)[None, :]
    m_q = ((o_qy < height) & (o_qx < width))[:, None]
    o_n = (o_qy * width + o_qx).to(tl.int64)[:, None]
    p_rows = p_q + i_image * stride_qb + i_head * stride_qh + o_n * stride_qn + o_d[None, :]
    b_q = tl.load(p_rows, mask=m_q & m_d, other=0.0)  # [QUERIES, PADDED]
    if WIDEN:
        b_q = b_q.to(tl.float32)
    b_max = tl.full([QUERIES], float("-inf"), dtype=tl.float32)
    b_total = tl.zeros([QUERIES], dtype=tl.float32)
    b_sum = tl.zeros([QUERIES, PADDED], dtype=tl.float32)
    for begin in range(0, SEEN, BLOCK_K):
        o_k = begin + tl.arange(0, BLOCK_K)
        o_ky, o_kx = first_y - REACH + o_k // SEEN_X, first_x - REACH + o_k % SEEN_X
        m_k = (o_k < SEEN) & (o_ky >= 0) & (o_ky < height) & (o_kx >= 0) & (o_kx < width)
        o_m = (o_ky * width + o_kx).to(tl.int64)[:, None]
        m_rows = m_k[:, None] & m_d
        p_keys = p_k + i_image * stride_kb + i_head * stride_kh + o_m * stride_kn + o_d[None, :]
        b_k = tl.load(p_keys, mask=m_rows, other=0.0)  # [BLOCK_K, PADDED]
        p_values = p_v + i_image * stride_vb + i_head * stride_vh + o_m * stride_vn + o_d[None, :]
        b_v = tl.load(p_values, mask=m_rows, other=0.0)  # [BLOCK_K, PADDED]
        if WIDEN:
            b_k = b_k.to(tl.float32)
        dy, dx = o_qy[:, None] - o_ky[None, :] + REACH, o_qx[:, None] - o_kx[None, :] + REACH
        m_seen = m_k[None, :] & (dy >= 0) & (dy <= 2 * REACH) & (dx >= 0) & (dx <= 2 * REACH)
        o_t = dy.to(tl.int64) * stride_ty + dx.to(tl.int64) * stride_tx + i_head * stride_th
        b_bias = tl.load(p_table + o_t, mask=m_seen, other=0.0).to(tl.float32)  # [QUERIES, BLOCK_K]
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * SCALE + b_bias
        b_s = tl.where(m_seen, b_s, float("-inf"))
        b_higher = tl.maximum(b_max, tl.max(b_s, axis=1))
        b_base = tl.where(b_higher == float("-inf"), 0.0, b_higher)  # until a key is seen
        b_w = tl.exp(b_s - b_base[:, None])
        b_keep = tl.exp(b_max - b_base)
        b_total = b_total * b_keep + tl.sum(b_w, axis=1)
        b_w = b_w.to(b_v.dtype)
        if WIDEN:
            b_w, b_v = b_w.to(tl.float32), b_v.to(tl.float32)
        b_sum = tl.dot(b_w, b_v, b_sum * b_keep[:, None], input_precision="ieee")
        b_max = b_higher
    b_out = b_sum / tl.where(b_total == 0.0, 1.0, b_total)[:, None]  # queries past the edge may see nothing
    o_n = (o_qy * width + o_qx).to(tl.int64)[:, None]
    p_rows = p_out + i_image * stride_ob + i_head * stride_oh + o_n * stride_on + o_d[None, :]
    tl.store(p_rows, b_out.to(p_out.dtype.element_ty), mask=m_q & m_d)


def window_config(size: int, itemsize: int) -> dict[str, int]:
    """Compile-time sizes for heads of ``size``: float32 uses no tensor cores, so fewer keys fit into the registers."""
    block = BLOCK_K if itemsize == 2 else BLOCK_K // 4
    padded = max(16, triton.next_power_of_2(size))
    return dict(SIZE=size, PADDED=padded, TILE_Y=TILE_Y, TILE_X=TILE_X, BLOCK_K=block, num_warps=NUM_WARPS)


def window_attention(q: Tensor, k: Tensor, v: Tensor, table: Tensor, height: int, width: int, out: Tensor) -> None:
    """Launch on (B, height * width, H, d), last dimension contiguous; writes ``out``."""
    if out.numel() == 0:
        return
    b, _, heads, size = q.shape
    strides = [s for x in (q, k, v) for s in x.stride()[:3]] + [*table.stride(), *out.stride()[:3]]
    window_attention_kernel[(triton.cdiv(height, TILE_Y) * triton.cdiv(width, TILE_X), heads, b)](
        *(q, k, v, table, out, heads, height, width, *strides),
        SCALE=1 / math.sqrt(size),
        WIDEN=q.device.type == "cpu",
        WINDOW=(table.shape[0] + 1) // 2,
        **window_config(size, q.element_size()),
        enable_fp_fusion=True,
    )


def _aot_case(size: int) -> AotCase:
    def constants(itemsize: int) -> dict[str, Any]:
        config = window_config(size, itemsize)
        del config["num_warps"]
        return {**config, "SCALE": size**-0.5, "WIDEN": False, "WINDOW": 8}

    return AotCase(
        "window_attention_kernel",
        constants,
        NUM_WARPS,
        outputs=lambda c: c["TILE_Y"] * c["TILE_X"] * c["SIZE"],
        types=float32("table"),
        variant=f"heads of {size}",
        within=("x",),
    )


AOT_CASES = (_aot_case(40), _aot_case(72))  # SSDD-S and SSDD-M
