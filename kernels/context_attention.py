"""softmax(q k^T / 8) v (+ accumulate) over at most 256 context tokens (msdd_fast/ops/context_attention.py).

A program loads K and V of one head once for BLOCK_N queries and holds all their scores, so the softmax needs one pass.
Tensors are read by their strides, without copies.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from msdd_fast.kernels._aot import CONTEXT, AotCase

BLOCK_N = 64
NUM_WARPS = 4
HEAD_SIZE = 64
SCALE = math.log2(math.e) / math.sqrt(HEAD_SIZE)


@triton.jit
def context_attention_kernel(
    p_q: tl.tensor,  # (B, N, H, D)
    p_k: tl.tensor,  # (B, L, H, D)
    p_v: tl.tensor,  # (B, L, H, D)
    p_accumulate: tl.tensor,  # (B, N, H, D) or anything
    p_out: tl.tensor,  # (B, N, H, D)
    heads: tl.tensor,  # H
    queries: tl.tensor,  # N
    keys: tl.tensor,  # L
    stride_qb: tl.tensor,  # strides in elements of image, token and head; that of D is 1
    stride_qn: tl.tensor,
    stride_qh: tl.tensor,
    stride_kb: tl.tensor,
    stride_kn: tl.tensor,
    stride_kh: tl.tensor,
    stride_vb: tl.tensor,
    stride_vn: tl.tensor,
    stride_vh: tl.tensor,
    stride_ab: tl.tensor,
    stride_an: tl.tensor,
    stride_ah: tl.tensor,
    stride_ob: tl.tensor,
    stride_on: tl.tensor,
    stride_oh: tl.tensor,
    SCALE: tl.constexpr,  # log2(e) / sqrt(D)
    ACCUMULATE: tl.constexpr,
    WIDEN: tl.constexpr,  # for the interpreter, which multiplies the bits of bfloat16
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,  # power of 2, at least L
    D: tl.constexpr,
) -> None:
    tiles = tl.cdiv(queries, BLOCK_N)
    pair = tl.program_id(0) // tiles
    i_image = (pair // heads).to(tl.int64)
    i_head = (pair % heads).to(tl.int64)
    o_n = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_l = tl.arange(0, BLOCK_L).to(tl.int64)
    o_d = tl.arange(0, D)[None, :]
    m_n = (o_n < queries)[:, None]
    m_l = o_l < keys

    p_rows = p_q + i_image * stride_qb + i_head * stride_qh + o_n[:, None] * stride_qn + o_d
    b_q = tl.load(p_rows, mask=m_n, other=0.0)  # [BLOCK_N, D]
    p_rows = p_k + i_image * stride_kb + i_head * stride_kh + o_l[:, None] * stride_kn + o_d
    b_k = tl.load(p_rows, mask=m_l[:, None], other=0.0)  # [BLOCK_L, D]
    p_rows = p_v + i_image * stride_vb + i_head * stride_vh + o_l[:, None] * stride_vn + o_d
    b_v = tl.load(p_rows, mask=m_l[:, None], other=0.0)  # [BLOCK_L, D]

    if WIDEN:
        b_q, b_k = b_q.to(tl.float32), b_k.to(tl.float32)
    b_s = tl.dot(b_q, tl.trans(b_k)) * SCALE  # [BLOCK_N, BLOCK_L]
    b_s = tl.where(m_l[None, :], b_s, float("-inf"))
    b_p = tl.exp2(b_s - tl.max(b_s, axis=1)[:, None])
    b_w = b_p.to(b_v.dtype)
    if WIDEN:
        b_w, b_v = b_w.to(tl.float32), b_v.to(tl.float32)
    b_out = tl.dot(b_w, b_v) / tl.sum(b_p, axis=1)[:, None]  # [BLOCK_N, D]
    if ACCUMULATE:
        p_rows = p_accumulate + i_image * stride_ab + i_head * stride_ah + o_n[:, None] * stride_an + o_d
        b_out += tl.load(p_rows, mask=m_n, other=0.0).to(tl.float32)  # [BLOCK_N, D]
    p_rows = p_out + i_image * stride_ob + i_head * stride_oh + o_n[:, None] * stride_on + o_d
    tl.store(p_rows, b_out.to(p_out.dtype.element_ty), mask=m_n)


def context_attention(q: Tensor, k: Tensor, v: Tensor, accumulate: Tensor | None, out: Tensor) -> None:
    """Launch on (B, N, H, 64), (B, L, H, 64) in bfloat16 or float16, last dimension contiguous; writes ``out``."""
    b, n, h, _ = q.shape
    if out.numel() == 0:
        return
    tensors = (q, k, v, q if accumulate is None else accumulate, out)
    strides = [s for x in tensors for s in x.stride()[:3]]
    context_attention_kernel[(b * h * triton.cdiv(n, BLOCK_N),)](
        *tensors,
        h,
        n,
        k.shape[1],
        *strides,
        SCALE=SCALE,
        ACCUMULATE=accumulate is not None,
        WIDEN=q.device.type == "cpu",
        BLOCK_N=BLOCK_N,
        BLOCK_L=max(16, triton.next_power_of_2(k.shape[1])),
        D=HEAD_SIZE,
        num_warps=NUM_WARPS,
        enable_fp_fusion=True,
    )


AOT_CASES = (
    AotCase(
        "context_attention_kernel",
        {
            **{"SCALE": SCALE, "ACCUMULATE": True, "WIDEN": False},
            **{"BLOCK_N": BLOCK_N, "BLOCK_L": CONTEXT, "D": HEAD_SIZE},
        },
        NUM_WARPS,
        outputs=lambda c: c["BLOCK_N"] * c["D"],
        dtypes=("bf16", "fp16"),
    ),
)
