"""context_attention: cross-attention of image tokens over a short context (paper section 4.1, SPEC head, "cross").

    out = softmax(q k^T / sqrt(d)) v (+ accumulate)        per image and head

q (B, N, H, d), k and v (B, L, H, d), accumulate (B, N, H, d), one dtype: float32, bfloat16 or float16; strides as they
come, so views of packed or token-major buffers cost no copy. out (B, N, H, d) is dense in q's memory order, token-major
if tokens lie further apart than images. Under autocast all are cast to its dtype. A "cross" block sums the image's
self-attention, which is ``accumulate``, and this.

eager and cpu compute in float32 and round once. The kernels (cuda, triton) round the weights to the dtype too, as every
flash attention does; sdpa also rounds before it adds. The kernels take bfloat16 and float16, d = 64 and L <= 256. eager
and sdpa are differentiable. Scores must be finite in float32.

Moves (2 N + 2 L) B H d elements, (3 N + 2 L) with accumulate, and does 4 B H N L d FLOP. K and V of a head, 32 KiB at
L = 128, are read once by each thread block (csrc/include/msdd_fast/context_attention_kernel.h).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from msdd_fast.backends import can_use_cpu, can_use_cuda, can_use_triton
from msdd_fast.errors import InputError
from msdd_fast.ops._checks import FLOAT_DTYPES, check_device, check_float
from msdd_fast.ops._heads import attention_result, is_token_major
from msdd_fast.ops._op import Op, Verdict, both

HEAD_SIZE = 64
MAX_CONTEXT = 256


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
    if torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = (t.to(dtype) if isinstance(t, Tensor) and t.dtype in FLOAT_DTYPES else t for t in (q, k, v))
        if isinstance(accumulate, Tensor) and accumulate.dtype in FLOAT_DTYPES:
            accumulate = accumulate.to(dtype)
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
    with torch.autocast(q.device.type, enabled=False):
        weights = (q32 @ k32.transpose(2, 3) * q.shape[3] ** -0.5).softmax(dim=-1)
        out = (weights @ v32).transpose(1, 2)
    if accumulate is not None:
        out = out + accumulate.float()
    return _in_order_of(q, out.to(q.dtype))


def _sdpa(q: Tensor, k: Tensor, v: Tensor, accumulate: Tensor | None) -> Tensor:
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)
    return _in_order_of(q, out if accumulate is None else out + accumulate)


def _cpu(q: Tensor, k: Tensor, v: Tensor, accumulate: Tensor | None) -> Tensor:
    from msdd_fast import native

    return native.attention(q, k, v, accumulate)


def _cuda(q: Tensor, k: Tensor, v: Tensor, accumulate: Tensor | None) -> Tensor:
    from msdd_fast import native_cuda

    return native_cuda.context_attention(q, k, v, accumulate)


def _triton(q: Tensor, k: Tensor, v: Tensor, accumulate: Tensor | None) -> Tensor:
    from msdd_fast.kernels.context_attention import context_attention as launch

    out = attention_result(q)
    launch(q, k, v, accumulate, out)
    return out


def _in_order_of(q: Tensor, out: Tensor) -> Tensor:
    """``out``, dense in q's memory order; copied only if it is not so."""
    return out.transpose(0, 1).contiguous().transpose(0, 1) if is_token_major(q) else out.contiguous()


def _can_use_sdpa(q: Tensor, k: Tensor, v: Tensor, accumulate: Tensor | None) -> Verdict:
    return True, "F.scaled_dot_product_attention"


def _can_use_cpu(q: Tensor, k: Tensor, v: Tensor, accumulate: Tensor | None) -> Verdict:
    if q.shape[3] % 16 or q.shape[3] > 128:
        return both(can_use_cpu(q), (False, f"needs a head size that is a multiple of 16 up to 128, got {q.shape[3]}"))
    if any(x is not None and x.stride(3) != 1 for x in (q, k, v, accumulate)):
        return both(can_use_cpu(q), (False, "needs the last dimension of all tensors to be contiguous"))
    return can_use_cpu(q)


def _can_use_cuda(q: Tensor, k: Tensor, v: Tensor, accumulate: Tensor | None) -> Verdict:
    return both(can_use_cuda(q), _kernels_fit(q, k, v, accumulate))


def _can_use_triton(q: Tensor, k: Tensor, v: Tensor, accumulate: Tensor | None) -> Verdict:
    return both(can_use_triton(q), _kernels_fit(q, k, v, accumulate))


def _kernels_fit(q: Tensor, k: Tensor, v: Tensor, accumulate: Tensor | None) -> Verdict:
    """Whether the GPU kernels' contract holds: dtype, head size, context length, rows at multiples of 16 bytes."""
    if q.dtype == torch.float32:
        return False, f"works in bfloat16 and float16, got {q.dtype}"
    if q.shape[3] != HEAD_SIZE:
        return False, f"needs a head size of {HEAD_SIZE}, got {q.shape[3]}"
    if k.shape[1] > MAX_CONTEXT:
        return False, f"takes at most {MAX_CONTEXT} context tokens, got {k.shape[1]}"
    for name, x in (("q", q), ("k", k), ("v", v), ("accumulate", accumulate)):
        if x is not None and (x.stride(3) != 1 or any(s % 8 for s in (*x.stride()[:3], x.storage_offset()))):
            got = f"{name} with strides {tuple(x.stride())}, offset {x.storage_offset()}"
            return False, f"needs contiguous heads at multiples of 16 bytes, got {got}"
    return True, ""


OP = Op(
    "context_attention",
    "(Tensor q, Tensor k, Tensor v, Tensor? accumulate) -> Tensor",
    context_attention_eager,
    lambda q, *_: attention_result(q),
)
OP.register("cuda", _cuda, _can_use_cuda)
# The C++ first: with TRITON_INTERPRET=1 the other could run on CPU tensors too, very slowly.
OP.register("cpu", _cpu, _can_use_cpu)
OP.register("triton", _triton, _can_use_triton)
OP.register("sdpa", _sdpa, _can_use_sdpa, differentiable=True)
