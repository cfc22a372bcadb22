"""Per-head LayerNorm or RMSNorm and rotary embedding of q and k: one read, one write (ops/qk_norm_rope.py)."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from msdd_fast.kernels._aot import HEAD_DIM, HEADS, PID_HEADS, AotCase, float32
from msdd_fast.kernels._norm import normalise, rms_normalise


@triton.jit
def qk_norm_rope_kernel(
    p_x: tl.tensor,  # (inner, outer) tokens of (PARTS + 1, HEADS, DIM)
    p_weight: tl.tensor,  # (1 or 2, PARTS, DIM)
    p_bias: tl.tensor,  # (1 or 2, PARTS, DIM); not read if RMS
    p_cos: tl.tensor,  # (tokens, DIM / 2) fp32
    p_sin: tl.tensor,  # (tokens, DIM / 2) fp32; not read if COSINE
    p_out: tl.tensor,  # (outer, inner, PARTS, HEADS, DIM)
    inner: tl.tensor,  # images, if the memory order is token-major, else tokens; program (outer, inner)
    stride_outer: tl.tensor,  # of p_x
    stride_inner: tl.tensor,
    split: tl.tensor,  # tokens from here on take the second entry of weight and bias
    PARTS: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    EPS: tl.constexpr,
    TOKEN_MAJOR: tl.constexpr,
    COSINE: tl.constexpr,
    RMS: tl.constexpr,
    PADDED: tl.constexpr,  # power of 2, at least DIM
    BLOCK: tl.constexpr,
) -> None:
    # A program: one token of one image, one part of it, up to BLOCK heads. A pair of elements stays in its lane.
    i = tl.program_id(0)
    i_part = tl.program_id(1)
    i_outer, i_inner = (i // inner).to(tl.int64), (i % inner).to(tl.int64)
    i_token = i_outer if TOKEN_MAJOR else i_inner
    o_head = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    o_dim, o_pair = tl.arange(0, PADDED), tl.arange(0, PADDED // 2)
    m_dim, m_pair = o_dim < DIM, o_pair < DIM // 2
    o = (i_part * HEADS + o_head)[:, None] * DIM + o_dim[None, :]
    m = (o_head < HEADS)[:, None] & m_dim[None, :]
    p_row = p_x + i_outer * stride_outer + i_inner * stride_inner
    b_x = tl.load(p_row + o, mask=m, other=0.0).to(tl.float32)  # [BLOCK, PADDED]
    o_affine = (tl.where(i_token < split, 0, PARTS) + i_part) * DIM + o_dim
    b_weight = tl.load(p_weight + o_affine, mask=m_dim, other=0.0).to(tl.float32)[None, :]  # [1, PADDED]
    if RMS:
        b_y = rms_normalise(b_x, DIM, EPS) * b_weight
    else:
        b_bias = tl.load(p_bias + o_affine, mask=m_dim, other=0.0).to(tl.float32)[None, :]  # [1, PADDED]
        b_y = normalise(b_x, m, DIM, EPS) * b_weight + b_bias
    b_even, b_odd = tl.split(tl.reshape(b_y, (BLOCK, PADDED // 2, 2)))
    b_cos = tl.load(p_cos + i_token * (DIM // 2) + o_pair, mask=m_pair, other=0.0)[None, :]  # [1, PADDED / 2]
    if COSINE:
        b_y = tl.join(b_even * b_cos, b_odd * b_cos)
    else:
        b_sin = tl.load(p_sin + i_token * (DIM // 2) + o_pair, mask=m_pair, other=0.0)[None, :]  # [1, PADDED / 2]
        b_y = tl.join(b_even * b_cos - b_odd * b_sin, b_even * b_sin + b_odd * b_cos)
    b_y = tl.reshape(b_y, (BLOCK, PADDED))
    tl.store(p_out + i.to(tl.int64) * (PARTS * HEADS * DIM) + o, b_y.to(p_out.dtype.element_ty), mask=m)


def heads_config(heads: int, head_dim: int) -> dict[str, int]:
    """PADDED, BLOCK of heads a program, and num_warps: all heads if they are few, up to 1024 elements."""
    padded = triton.next_power_of_2(head_dim)
    return {"PADDED": padded, "BLOCK": min(triton.next_power_of_2(heads), 1024 // padded), "num_warps": 1}


def qk_norm_rope(
    out: Tensor,
    qkv: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cos: Tensor,
    sin: Tensor | None,
    split: int,
    eps: float,
) -> None:
    """Fill ``out`` (B, N, P - 1, H, d), dense in (B, N) or (N, B) order; qkv is contiguous in (P, H, d)."""
    b, n, parts, heads, d = out.shape
    if out.numel() == 0:
        return
    token_major = not out.is_contiguous()
    config = heads_config(heads, d)
    inner, outer_dim, inner_dim = (b, 1, 0) if token_major else (n, 0, 1)
    qk_norm_rope_kernel[(b * n, parts, triton.cdiv(heads, config["BLOCK"]))](
        *(qkv, weight, weight if bias is None else bias, cos, cos if sin is None else sin, out),
        *(inner, qkv.stride(outer_dim), qkv.stride(inner_dim), split),
        **dict(PARTS=parts, HEADS=heads, DIM=d, EPS=eps, TOKEN_MAJOR=token_major, COSINE=sin is None),
        RMS=bias is None,
        **config,
        enable_fp_fusion=True,
    )


def _aot_case(heads: int, head_dim: int, rms: bool) -> AotCase:
    config = heads_config(heads, head_dim)
    return AotCase(
        "qk_norm_rope_kernel",
        {
            **{"PARTS": 2, "HEADS": heads, "DIM": head_dim, "EPS": 1e-6},
            **{"TOKEN_MAJOR": True, "COSINE": False, "RMS": rms, "PADDED": config["PADDED"], "BLOCK": config["BLOCK"]},
        },
        config["num_warps"],
        outputs=lambda c: min(c["HEADS"], c["BLOCK"]) * c["DIM"],
        types=float32("cos", "sin"),
        variant=f"RMS, head size {head_dim}" if rms else "",
        within=("y", "z"),
    )


AOT_CASES = (_aot_case(HEADS, HEAD_DIM, False), *(_aot_case(*heads, True) for heads in PID_HEADS))
