"""context_attention: cross-attention of image tokens over a short context (paper section 4.1, SPEC "cross" block).

    out = softmax(q k^T / sqrt(d)) v (+ accumulate)

q (B, N, H, d), k and v (B, L, H, d), accumulate (B, N, H, d): one dtype of float32, bfloat16, float16; any strides. out
(B, N, H, d) is dense in the memory order of q's tokens: batch-major, or token-major, which is
``empty(N, B, H, d).transpose(0, 1)``, if q's token stride exceeds its batch stride and B > 1. "cross" blocks sum the
image's self-attention, which is ``accumulate``, and this.

eager computes scores, softmax and sum in float32 and rounds once; it is differentiable. The kernels round the weights
to the dtype, as every flash attention does, and the result once. sdpa rounds before it adds. The kernels (cuda, triton)
take bfloat16 and float16, d = 64 and L <= 256, and read strided views where they lie.

Moves B*H*(2*N + 2*L)*d elements (3*N with accumulate), 4*B*H*N*L*d FLOP: with L = 128 and d = 64, bound by memory on a
GPU up to N of about 1,000.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from msdd_fast.backends import can_use_cuda, can_use_triton
from msdd_fast.errors import InputError
from msdd_fast.ops._checks import check_device, check_float
from msdd_fast.ops._op import Op, Verdict

HEAD_SIZE = 64
MAX_CONTEXT = 256


def context_attention(
    q: Tensor, k: Tensor, v: Tensor, accumulate: Tensor | None = None, *, backend: str | None = None
) -> Tensor:
    """Attention of q over the context's k and v, plus ``accumulate``.

    Args:
        q: (B, N, H, d).
        k, v: (B, L, H, d), L at least 1.
        accumulate: (B, N, H, d), added in float32, or None.

    Raises InputError for other shapes, or unlike dtypes or devices.
    """
    check_float("q", q)
    if q.ndim != 4 or q.shape[3] == 0:
        raise InputError(f"q must be a tensor (B, N, H, d) with d > 0, got {tuple(q.shape)}")
    b, _, h, d = q.shape
    for name, x in (("k", k), ("v", v)):
        _check_same_kind(name, x, q)
        if x.ndim != 4 or (x.shape[0], *x.shape[2:]) != (b, h, d) or x.shape[1] == 0:
            raise InputError(f"{name} must be ({b}, L, {h}, {d}) with L > 0, as q is, got {tuple(x.shape)}")
    if v.shape != k.shape:
        raise InputError(f"v must have the shape of k, {tuple(k.shape)}, got {tuple(v.shape)}")
    if accumulate is not None:
        _check_same_kind("accumulate", accumulate, q)
        if accumulate.shape != q.shape:
            raise InputError(f"accumulate must have the shape of q, {tuple(q.shape)}, got {tuple(accumulate.shape)}")
    out: Tensor = OP(q, k, v, accumulate, backend=backend)
    return out


def _check_same_kind(name: str, x: Tensor, q: Tensor) -> None:
    check_float(name, x)
    check_device(name, x, "q", q)
    if x.dtype != q.dtype:
        raise InputError(f"{name} must have the dtype of q, {q.dtype}, got {x.dtype}")


def context_attention_eager(q: Tensor, k: Tensor, v: Tensor, accumulate: Tensor | None) -> Tensor:
    """Reference: plain torch, float32 inside."""
    q32, k32, v32 = (x.float().transpose(1, 2) for x in (q, k, v))
    weights = (q32 @ k32.transpose(2, 3) * q.shape[3] ** -0.5).softmax(dim=3)
    out = (weights @ v32).transpose(1, 2)
    if accumulate is not None:
        out = out + accumulate.float()
    return _in_order(out.to(q.dtype), q)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, accumulate: Tensor | None) -> Tensor:
    if q.numel() == 0:
        return _empty(q)
    out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    return _in_order(out, q) if accumulate is None else torch.add(out, accumulate, out=_empty(q))


def _cuda(q: Tensor, k: Tensor, v: Tensor, accumulate: Tensor | None) -> Tensor:
    from msdd_fast import native

    out = _empty(q)
    native.context_attention(q, k, v, accumulate, out)
    return out


def _triton(q: Tensor, k: Tensor, v: Tensor, accumulate: Tensor | None) -> Tensor:
    from msdd_fast.kernels.context_attention import context_attention as launch

    out = _empty(q)
    launch(q, k, v, accumulate, out)
    return out


def _token_major(q: Tensor) -> bool:
    return q.shape[0] > 1 and q.stride(1) > q.stride(0)


def _empty(q: Tensor) -> Tensor:
    """An uninitialised (B, N, H, d), dense in the memory order of q's tokens."""
    b, n, h, d = q.shape
    if _token_major(q):
        return torch.empty(n, b, h, d, dtype=q.dtype, device=q.device).transpose(0, 1)
    return torch.empty(b, n, h, d, dtype=q.dtype, device=q.device)


def _in_order(out: Tensor, q: Tensor) -> Tensor:
    """``out`` dense in the memory order of q's tokens; copies only if it is not."""
    return out.transpose(0, 1).contiguous().transpose(0, 1) if _token_major(q) else out.contiguous()


def _kernels_fit(q: Tensor, k: Tensor, v: Tensor, accumulate: Tensor | None) -> Verdict:
    """Whether the kernels' contract holds: dtype, head size, context length, rows at multiples of 16 bytes."""
    if q.dtype == torch.float32:
        return False, "takes bfloat16 and float16, got float32"
    if q.shape[3] != HEAD_SIZE:
        return False, f"takes heads of {HEAD_SIZE}, got {q.shape[3]}"
    if k.shape[1] > MAX_CONTEXT:
        return False, f"takes at most {MAX_CONTEXT} context tokens, got {k.shape[1]}"
    for name, x in (("q", q), ("k", k), ("v", v), ("accumulate", accumulate)):
        if x is not None and (x.stride(3) != 1 or any(s % 8 for s in (*x.stride()[:3], x.storage_offset()))):
            strides = f"strides {tuple(x.stride())}, offset {x.storage_offset()}"
            return False, f"takes contiguous heads at multiples of 16 bytes, got {name} with {strides}"
    return True, ""


def _can_use_cuda(q: Tensor, k: Tensor, v: Tensor, accumulate: Tensor | None) -> Verdict:
    fits, reason = _kernels_fit(q, k, v, accumulate)
    return can_use_cuda(q) if fits else (False, reason)


def _can_use_triton(q: Tensor, k: Tensor, v: Tensor, accumulate: Tensor | None) -> Verdict:
    fits, reason = _kernels_fit(q, k, v, accumulate)
    return can_use_triton(q) if fits else (False, reason)


OP = Op(
    "context_attention",
    "(Tensor q, Tensor k, Tensor v, Tensor? accumulate) -> Tensor",
    context_attention_eager,
    lambda q, *_: _empty(q),
)
OP.register("cuda", _cuda, _can_use_cuda)
OP.register("triton", _triton, _can_use_triton)
OP.register("sdpa", _sdpa, lambda *_: (True, "torch.nn.functional.scaled_dot_product_attention"))
