"""Shared by the kernels with a norm: a program holds a whole row in registers; LayerNorm takes two passes."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def normalise(b_x: tl.tensor, m: tl.tensor, WIDTH: tl.constexpr, EPS: tl.constexpr) -> tl.tensor:
    """(b_x - mean) / sqrt(var + EPS) over the last axis, where ``m`` marks WIDTH elements; b_x is 0 elsewhere."""
    b_mean = tl.sum(b_x, axis=-1, keep_dims=True) / WIDTH
    b_centred = tl.where(m, b_x - b_mean, 0.0)
    b_var = tl.sum(b_centred * b_centred, axis=-1, keep_dims=True) / WIDTH
    return b_centred * tl.rsqrt(b_var + EPS)


@triton.jit
def rms_normalise(b_x: tl.tensor, WIDTH: tl.constexpr, EPS: tl.constexpr) -> tl.tensor:
    """b_x / sqrt(mean(b_x^2) + EPS) over WIDTH elements of the last axis; b_x is 0 beyond them."""
    return b_x * tl.rsqrt(tl.sum(b_x * b_x, axis=-1, keep_dims=True) / WIDTH + EPS)


def row_config(width: int) -> dict[str, int]:
    """BLOCK and num_warps for rows of ``width``: up to 1024 elements fit one warp, whose sums need no shared memory."""
    block = max(32, triton.next_power_of_2(width))
    return {"BLOCK": block, "num_warps": max(1, min(8, block // 1024))}
