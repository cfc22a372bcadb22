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

import torch
import torch.nn.functional as F
from torch import Tensor

from msdd_fast.backends import tuned as selection
from msdd_fast.backends.cpu import can_use_cpu
from msdd_fast.backends.cuda import can_use_cuda
from msdd_fast.backends.packages import can_use_package
from msdd_fast.errors import InputError
from msdd_fast.layout import attention_result
from msdd_fast.ops._checks import FLOAT_DTYPES, check_device
from msdd_fast.ops._heads import as_autocast_has_it, cpu_fits, in_order_of, kernels_fit, rows_are_dense
from msdd_fast.ops._registry import Op, Verdict, both


def attention(q: Tensor, k: Tensor, v: Tensor, *, backend: str | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d)) v. Raises InputError for tensors that do not fit together, and for no keys."""
    _check_heads("q", q)
    q, k, v = as_autocast_has_it(q, k, v)
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
    if not isinstance(x, Tensor):
        raise InputError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.dtype not in (*FLOAT_DTYPES, torch.float64):
        raise InputError(f"{name} must be float32, bfloat16, float16 or float64, got {x.dtype}")
    if x.ndim != 4 or x.shape[3] == 0:
        raise InputError(f"{name} must be a tensor (B, N, heads, head size), got {tuple(x.shape)}")


def attention_eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Reference: plain torch, float32 (or wider) throughout."""
    wide = torch.promote_types(q.dtype, torch.float32)
    qw, kw, vw = (x.transpose(1, 2).to(wide) for x in (q, k, v))
    weights = (qw @ kw.transpose(2, 3) * q.shape[3] ** -0.5).softmax(dim=-1)
    return in_order_of(q, (weights @ vw).transpose(1, 2).to(q.dtype))


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return in_order_of(q, out.transpose(1, 2))


def _cpu(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from msdd_fast import native

    return native.attention(q, k, v)


def _cuda(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from msdd_fast.native import cuda as native_cuda

    return native_cuda.context_attention(q, k, v)


def _xformers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from xformers.ops import memory_efficient_attention

    return in_order_of(q, memory_efficient_attention(q, k, v))


def _flash_attn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from flash_attn import flash_attn_func

    return in_order_of(q, flash_attn_func(q, k, v))


def _can_use_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Verdict:
    return True, "F.scaled_dot_product_attention"


def _can_use_cpu(q: Tensor, k: Tensor, v: Tensor) -> Verdict:
    fits = cpu_fits(q, k, v)
    return can_use_cpu(q) if fits[0] else fits


def _can_use_cuda(q: Tensor, k: Tensor, v: Tensor) -> Verdict:
    return both(can_use_cuda(q), kernels_fit(q, k, v))


def _can_use_xformers(q: Tensor, k: Tensor, v: Tensor) -> Verdict:
    verdict = can_use_package(q, "xformers", "xformers", "pip install 'xformers>=0.0.35'")
    if verdict[0] and q.dtype not in FLOAT_DTYPES:
        return False, f"works in float32, bfloat16 and float16, got {q.dtype}"
    return both(verdict, rows_are_dense(q, k, v))


def _can_use_flash_attn(q: Tensor, k: Tensor, v: Tensor) -> Verdict:
    verdict = can_use_package(q, "flash-attn", "flash_attn", "pip install flash-attn --no-build-isolation")
    if verdict[0] and q.dtype not in (torch.bfloat16, torch.float16):
        return False, f"works in bfloat16 and float16, got {q.dtype}"
    if verdict[0] and (q.shape[3] % 8 or q.shape[3] > 256):
        return False, f"needs a head size that is a multiple of 8 up to 256, got {q.shape[3]}"
    return verdict


OP = Op(
    "attention",
    "(Tensor q, Tensor k, Tensor v) -> Tensor",
    attention_eager,
    lambda q, k, v: attention_result(q),
    fastest=lambda q, k, v: selection.fastest("attention", q.device, q.dtype, q.shape[3], q.shape[1]),
)
OP.register("sdpa", _sdpa, _can_use_sdpa, differentiable=True)
OP.register("cpu", _cpu, _can_use_cpu)
OP.register("cuda", _cuda, _can_use_cuda)
OP.register("flash-attn", _flash_attn, _can_use_flash_attn)
OP.register("xformers", _xformers, _can_use_xformers)
