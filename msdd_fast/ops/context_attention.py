"""context_attention: cross-attention of image tokens over a short context (docs/spec.md#cross-block).

    out = softmax(q k^T / sqrt(d)) v (+ accumulate)        per image and head

q (B, N, H, d), k and v (B, L, H, d), accumulate (B, N, H, d), one dtype: float32, bfloat16 or float16; strides as they
come, so views of packed or token-major buffers cost no copy. out (B, N, H, d) is dense in q's memory order, token-major
if tokens lie further apart than images. Under autocast all are cast to its dtype. A "cross" block sums the image's
self-attention, which is ``accumulate``, and this.

eager and cpu compute in float32 and round once. The kernels (cuda, triton) round the weights to the dtype too, as every
flash attention does; sdpa also rounds before it adds. The kernels take bfloat16 and float16, d = 64 and L <= 256. eager
and sdpa are differentiable. Scores must be finite in float32.

Moves (2 N + 2 L) B H d elements, (3 N + 2 L) with accumulate, and does 4 B H N L d FLOP. K and V of a head, 32 KiB at
L = 128, are read once by each thread block (context_attention_kernel.h).

qk-norm and RoPE of q are not fused into it: a "cross" block's q is that of the self-attention, too, so the one launch
of ``qk_norm_rope`` has prepared it for both (families/msdd/engine/network.py). Fused, they would be done twice, and no
launch would be saved.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from msdd_fast import native
from msdd_fast.backends.cuda import CUDA
from msdd_fast.backends.sdpa import SDPA
from msdd_fast.backends.triton import TRITON
from msdd_fast.errors import InputError
from msdd_fast.layout import attention_result, like_layout
from msdd_fast.ops._checks import check_device, check_float
from msdd_fast.ops._example import normals
from msdd_fast.ops._heads import cast_for_autocast, cpu_fits, kernels_fit, without_autocast
from msdd_fast.ops._native import register_native
from msdd_fast.ops._registry import Op


def context_attention(
    q: Tensor, k: Tensor, v: Tensor, accumulate: Tensor | None = None, *, backend: str | None = None
) -> Tensor:
    """Attention of q over the context's k and v, plus ``accumulate``.

    Args:
        q: (B, N, H, d).
        k, v: (B, L, H, d), L at least 1.
        accumulate: (B, N, H, d) or None.

    Raises InputError for other shapes, or unlike dtypes or devices.
    """
    check_float("q", q)
    q, k, v, accumulate = cast_for_autocast(q, k, v, accumulate)
    if q.ndim != 4 or q.shape[3] == 0:
        raise InputError(f"q must be a tensor (B, N, heads, head size), got {tuple(q.shape)}")
    _check_heads("k", k, q)
    _check_heads("v", v, q)
    _check_shape("k", k, q, k.shape[1])
    _check_shape("v", v, q, k.shape[1])
    if accumulate is not None:
        _check_heads("accumulate", accumulate, q)
        _check_shape("accumulate", accumulate, q, q.shape[1])
    if k.shape[1] == 0:
        raise InputError(f"k must hold at least one context token, got the shape {tuple(k.shape)}")
    out: Tensor = OP(q, k, v, accumulate, backend=backend)
    return out


def _check_heads(name: str, x: Tensor, q: Tensor) -> None:
    check_float(name, x)
    check_device(name, x, "q", q)
    if x.dtype != q.dtype:
        raise InputError(f"{name} must have the dtype of q, {q.dtype}, got {x.dtype}")
    if x.ndim != 4:
        raise InputError(f"{name} must be a tensor (B, N, heads, head size), got {tuple(x.shape)}")


def _check_shape(name: str, x: Tensor, q: Tensor, tokens: int) -> None:
    expected = (q.shape[0], tokens, q.shape[2], q.shape[3])
    if x.shape != expected:
        raise InputError(f"{name} must have the shape {expected}, got {tuple(x.shape)}")


def context_attention_eager(q: Tensor, k: Tensor, v: Tensor, accumulate: Tensor | None) -> Tensor:
    """Reference: plain torch, float32 throughout."""
    q32, k32, v32 = (x.transpose(1, 2).float() for x in (q, k, v))
    with without_autocast(q):
        weights = (q32 @ k32.transpose(2, 3) * q.shape[3] ** -0.5).softmax(dim=-1)
        out = (weights @ v32).transpose(1, 2)
    if accumulate is not None:
        out = out + accumulate.float()
    return like_layout(out.to(q.dtype), q)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, accumulate: Tensor | None) -> Tensor:
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)
    return like_layout(out if accumulate is None else out + accumulate, q)


def _cuda(q: Tensor, k: Tensor, v: Tensor, accumulate: Tensor | None) -> Tensor:
    from msdd_fast.native import cuda as native_cuda

    return native_cuda.context_attention(q, k, v, accumulate)


def _triton(q: Tensor, k: Tensor, v: Tensor, accumulate: Tensor | None) -> Tensor:
    from msdd_fast.kernels.context_attention import context_attention as launch

    out = attention_result(q)
    launch(q, k, v, accumulate, out)
    return out


def _example() -> tuple[Any, ...]:
    (heads,) = normals((2, 5, 4, 2, 64))
    return heads.bfloat16().unbind(2)


OP = Op(
    "context_attention",
    "(Tensor q, Tensor k, Tensor v, Tensor? accumulate) -> Tensor",
    context_attention_eager,
    lambda q, *_: attention_result(q),
    _example,
    reads_offsets=True,
)
OP.register(CUDA, _cuda, kernels_fit)
register_native(OP, native.attention, fits=cpu_fits)
OP.register(TRITON, _triton, kernels_fit)
OP.register(SDPA, _sdpa, differentiable=True)
