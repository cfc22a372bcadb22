"""attention: softmax attention without a mask, over any two sets of tokens.

    out = softmax(q k^T / sqrt(d)) v        per image and head

q (B, Nq, H, d), k and v (B, Nk, H, d), one dtype: float32, bfloat16 or float16 (eager and sdpa: float64 too, to check
gradients); strides as they come, so views of a packed (B, N, 3, H, d) or token-major (N, B, 3, H, d) buffer cost no
copy. out (B, Nq, H, d) is dense in q's memory order, token-major if tokens lie further apart than images: then
``out.transpose(0, 1).flatten(2)`` is a view (Nq, B, H * d). Under autocast the three are cast to its dtype, as in
``F.scaled_dot_product_attention``.

Scores, softmax and sums are float32 in eager and cpu, rounded once; the others keep their own rules. cuda is the kernel
of context_attention, for at most 256 keys (the two coarsest scales of a joint block): K and V of a head stay in shared
memory, where kernels made for long sequences start over for every 64 or 128 queries. Moves
(2 Nq + 2 Nk) B H d elements and does 4 B H Nq Nk d FLOP; eager also stores the scores. eager and sdpa are
differentiable, and training takes sdpa. Used as in docs/spec.md#joint-block and docs/spec.md#cross-block.

Backends of ``auto``: the one that measured fastest here (msdd_fast/backends/tuned.py), else sdpa.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from msdd_fast import native
from msdd_fast.backends import tuned
from msdd_fast.backends.choice import Verdict
from msdd_fast.backends.cuda import CUDA
from msdd_fast.backends.packages import FLASH_ATTN, XFORMERS
from msdd_fast.backends.sdpa import SDPA
from msdd_fast.errors import InputError
from msdd_fast.layout import attention_result, like_layout
from msdd_fast.ops._checks import FLOAT_DTYPES, check_device, check_tensor
from msdd_fast.ops._example import normals
from msdd_fast.ops._heads import cast_for_autocast, cpu_fits, kernels_fit, rows_are_dense
from msdd_fast.ops._native import register_native
from msdd_fast.ops._registry import Op


def attention(q: Tensor, k: Tensor, v: Tensor, *, backend: str | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d)) v. Raises InputError for tensors that do not fit together, and for no keys."""
    _check_heads("q", q)
    q, k, v = cast_for_autocast(q, k, v)
    for name, x in (("k", k), ("v", v)):
        _check_heads(name, x)
        check_device(name, x, "q", q)
        if x.dtype != q.dtype:
            raise InputError(f"{name} must have the dtype of q, {q.dtype}, got {x.dtype}")
        expected = (q.shape[0], k.shape[1], q.shape[2], q.shape[3])
        if x.shape != expected:
            raise InputError(f"{name} must have the shape {tuple(expected)}, got {tuple(x.shape)}")
    if k.shape[1] == 0:
        raise InputError(f"k must hold at least one key, got the shape {tuple(k.shape)}")
    out: Tensor = OP(q, k, v, backend=backend)
    return out


def _check_heads(name: str, x: Tensor) -> None:
    check_tensor(name, x)
    if x.dtype not in (*FLOAT_DTYPES, torch.float64):
        raise InputError(f"{name} must be float32, bfloat16, float16 or float64, got {x.dtype}")
    if x.ndim != 4 or x.shape[3] == 0:
        raise InputError(f"{name} must be a tensor (B, N, heads, head size), got {tuple(x.shape)}")


def attention_eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Reference: plain torch, float32 (or wider) throughout."""
    wide = torch.promote_types(q.dtype, torch.float32)
    qw, kw, vw = (x.transpose(1, 2).to(wide) for x in (q, k, v))
    weights = (qw @ kw.transpose(2, 3) * q.shape[3] ** -0.5).softmax(dim=-1)
    return like_layout((weights @ vw).transpose(1, 2).to(q.dtype), q)


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return like_layout(out.transpose(1, 2), q)


def _cuda(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from msdd_fast.native import cuda as native_cuda

    return native_cuda.context_attention(q, k, v)


def _xformers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from xformers.ops import memory_efficient_attention

    return like_layout(memory_efficient_attention(q, k, v), q)


def _flash_attn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from flash_attn import flash_attn_func

    return like_layout(flash_attn_func(q, k, v), q)


def _xformers_fits(q: Tensor, k: Tensor, v: Tensor) -> Verdict:
    if q.dtype not in FLOAT_DTYPES:
        return False, f"works in float32, bfloat16 and float16, got {q.dtype}"
    return rows_are_dense(q, k, v)


def _flash_attn_fits(q: Tensor, k: Tensor, v: Tensor) -> Verdict:
    if q.dtype not in (torch.bfloat16, torch.float16):
        return False, f"works in bfloat16 and float16, got {q.dtype}"
    if q.shape[3] % 8 or q.shape[3] > 256:
        return False, f"needs a head size that is a multiple of 8 up to 256, got {q.shape[3]}"
    return True, ""


def _example() -> tuple[Any, ...]:
    (qkv,) = normals((2, 5, 3, 2, 16))
    return qkv.unbind(2)


OP = Op(
    "attention",
    "(Tensor q, Tensor k, Tensor v) -> Tensor",
    attention_eager,
    lambda q, k, v: attention_result(q),
    _example,
    fastest=lambda q, k, v: tuned.fastest("attention", q.device, q.dtype, q.shape[3], q.shape[1]),
    reads_offsets=True,
)
OP.register(SDPA, _sdpa, differentiable=True)
register_native(OP, native.attention, fits=cpu_fits)
OP.register(CUDA, _cuda, kernels_fit)
OP.register(FLASH_ATTN, _flash_attn, _flash_attn_fits)
OP.register(XFORMERS, _xformers, _xformers_fits)
