"""qk_norm_rope: per-head LayerNorm or RMSNorm and two-axis rotary embedding of q and k, as the linear layer left them
(docs/spec.md#qk-norm, docs/spec.md#rope).

    y = (x - mean) / sqrt(var + 1e-6) * weight + bias             over each head's d elements
    y = x / sqrt(mean(x^2) + 1e-6) * weight                       where bias is None
    (out[2i], out[2i+1]) = (y[2i] cos_i - y[2i+1] sin_i, y[2i] sin_i + y[2i+1] cos_i)

qkv is (B, N, P, H, d): P = 3 parts (q, k, v) or 2 (k, v), of which the first P - 1 are worked on; v is neither read nor
copied. The inner (P, H, d) is contiguous (else qkv is copied), B and N have any strides. weight and bias are
(S, P - 1, d): S = 1, or with ``split`` S = 2, entry 0 for tokens n < split and entry 1 for the others, so for two token
streams. cos and sin are float32 (N, d / 2); sin None is the "cosine" variant, out = y cos. The result
(B, N, P - 1, H, d) is dense in the memory order of qkv, (B, N, ...) or token-major (N, B, ...).

qkv, weight and bias each float32, bfloat16 or float16 (eager: any float dtype). Kernels compute in float32, the
variance in a second pass, and round once; they take every d that is a multiple of 4 up to 128. Moves
2 B N (P - 1) H d elements and, once each, the tables. Eager is differentiable.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from msdd_fast import native
from msdd_fast.backends.choice import Verdict
from msdd_fast.backends.triton import TRITON
from msdd_fast.diffusion.checks import check_layout
from msdd_fast.diffusion.rope import RopeTable, apply_rope
from msdd_fast.errors import InputError
from msdd_fast.layout import empty_tokens, is_token_major, like_layout
from msdd_fast.ops._adaln import check_split, rms_norm
from msdd_fast.ops._checks import FLOAT_DTYPES, check_device, check_floating
from msdd_fast.ops._example import normals
from msdd_fast.ops._native import register_native
from msdd_fast.ops._registry import Op
from msdd_fast.ops.norm_modulate import NORM_EPS

MAX_HEAD_DIM = 128  # as in csrc/include/msdd_fast/qk_norm_rope.h


def qk_norm_rope(
    qkv: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cos: Tensor,
    sin: Tensor | None,
    split: int | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """q and k, or k alone, normalised and rotated; see the module. Raises InputError for sizes that do not fit."""
    check_floating("qkv", qkv)
    if qkv.ndim != 5 or qkv.shape[2] not in (2, 3) or qkv.shape[4] < 4 or qkv.shape[4] % 4:
        expected = "(B, N, 2 or 3, heads, head_dim) with head_dim a multiple of 4"
        raise InputError(f"qkv must be {expected}, got {tuple(qkv.shape)}")
    _, tokens, parts, _, d = qkv.shape
    if split is not None:
        check_split(split, tokens, "tokens")
    for name, t in (("weight", weight), *(() if bias is None else (("bias", bias),))):
        check_floating(name, t)
        shape = (1 if split is None else 2, parts - 1, d)
        if t.shape != shape:
            raise InputError(f"{name} must be {shape}, (entries, parts, head_dim), got {tuple(t.shape)}")
        check_device(name, t, "qkv", qkv)
    for name, table in (("cos", cos), ("sin", sin)):
        if name == "sin" and table is None:
            continue
        if not isinstance(table, Tensor) or table.dtype != torch.float32 or table.shape != (tokens, d // 2):
            got = f"{table.dtype} {tuple(table.shape)}" if isinstance(table, Tensor) else type(table).__name__
            raise InputError(f"{name} must be a float32 tensor {(tokens, d // 2)}, (tokens, head_dim / 2), got {got}")
        check_layout(name, table)
        check_device(name, table, "qkv", qkv)
    out: Tensor = OP(qkv, weight, bias, cos, sin, split, backend=backend)
    return out


def qk_norm_rope_eager(
    qkv: Tensor, weight: Tensor, bias: Tensor | None, cos: Tensor, sin: Tensor | None, split: int | None
) -> Tensor:
    """Reference: plain torch; the norm is rounded to the dtype before the rotation."""
    _, tokens, parts, _, _ = qkv.shape
    cuts = [0, tokens] if split is None else [0, split, tokens]
    streams = [
        torch.stack(
            [_norm(x[:, :, p], weight[s, p], None if bias is None else bias[s, p]) for p in range(parts - 1)], 2
        )
        for s, x in enumerate(qkv.split([b - a for a, b in itertools.pairwise(cuts)], dim=1))
    ]
    heads = torch.cat(streams, dim=1) if len(streams) > 1 else streams[0]
    out = apply_rope(heads.flatten(2, 3), RopeTable(cos, sin)).view_as(heads).to(qkv.dtype)
    return like_layout(out, qkv) if is_token_major(qkv) else out


def _norm(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if bias is None:
        return rms_norm(x, weight, NORM_EPS)
    if weight.dtype == bias.dtype == x.dtype:
        return F.layer_norm(x, x.shape[-1:], weight, bias, NORM_EPS)
    wide = torch.promote_types(x.dtype, torch.promote_types(weight.dtype, bias.dtype))
    return F.layer_norm(x.to(wide), x.shape[-1:], weight.to(wide), bias.to(wide), NORM_EPS).to(x.dtype)


def _inner_dense(qkv: Tensor) -> Tensor:
    return qkv if qkv.stride()[2:] == (qkv.shape[3] * qkv.shape[4], qkv.shape[4], 1) else qkv.contiguous()


def _result(qkv: Tensor) -> Tensor:
    """Uninitialised."""
    _, _, parts, heads, d = qkv.shape
    return empty_tokens(qkv, parts - 1, heads, d)


def _contiguous(
    qkv: Tensor, weight: Tensor, bias: Tensor | None, cos: Tensor, sin: Tensor | None, split: int | None
) -> tuple[Any, ...]:
    """The arguments as the kernels read them; copies only what is laid out otherwise."""
    sin = None if sin is None else sin.contiguous()
    limit = qkv.shape[1] if split is None else split
    bias = None if bias is None else bias.contiguous()
    return _inner_dense(qkv), weight.contiguous(), bias, cos.contiguous(), sin, limit, NORM_EPS


def _triton(qkv: Tensor, *args: Any) -> Tensor:
    from msdd_fast.kernels.qk_norm_rope import qk_norm_rope as launch

    out = _result(qkv)
    launch(out, *_contiguous(qkv, *args))
    return out


def _kernels_fit(qkv: Tensor, weight: Tensor, bias: Tensor | None, *_: Any) -> Verdict:
    for t in (qkv, weight, bias):
        if t is not None and t.dtype not in FLOAT_DTYPES:
            return False, f"works in float32, bfloat16 and float16, got {t.dtype}"
    d = qkv.shape[4]
    return d <= MAX_HEAD_DIM, f"works with head_dim up to {MAX_HEAD_DIM}, got {d}"


def _example() -> tuple[Any, ...]:
    qkv, weight, bias, angles = normals((2, 6, 3, 4, 16), (1, 2, 16), (1, 2, 16), (6, 8))
    return qkv, weight, bias, angles.cos(), angles.sin(), None


OP = Op(
    "qk_norm_rope",
    "(Tensor qkv, Tensor weight, Tensor? bias, Tensor cos, Tensor? sin, int? split) -> Tensor",
    qk_norm_rope_eager,
    lambda qkv, *_: _result(qkv),
    _example,
)
register_native(OP, native.qk_norm_rope, _contiguous, _kernels_fit)
OP.register(TRITON, _triton, _kernels_fit)
