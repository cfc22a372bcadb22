"""Calls the C++ ``qk_norm_rope``."""

from __future__ import annotations

import torch
from torch import Tensor

from msdd_fast.errors import InputError
from msdd_fast.native._call import _call, _check_contiguous, _check_cpu, _view


def qk_norm_rope(
    out: Tensor,
    qkv: Tensor,
    weight: Tensor,
    bias: Tensor,
    cos: Tensor,
    sin: Tensor | None,
    split: int,
    eps: float,
) -> None:
    """Fill ``out`` (B, N, P - 1, H, d), dense in (B, N) or (N, B) order, from the leading parts of qkv (B, N, P, H, d).

    The inner (P, H, d) of qkv is contiguous; weight and bias float32 (S, P - 1, d), cos and sin float32 (N, d / 2), all
    contiguous; S is 2 if ``split`` < N.
    """
    _check_cpu("qkv", qkv)
    b, n, parts, heads, d = qkv.shape
    fits = out.shape == (b, n, parts - 1, heads, d) and out.dtype == qkv.dtype
    if not fits or not (out.is_contiguous() or out.transpose(0, 1).is_contiguous()):
        raise InputError(f"out must be {(b, n, parts - 1, heads, d)} {qkv.dtype}, dense, got {tuple(out.shape)}")
    if qkv.stride()[2:] != (heads * d, d, 1):
        raise InputError(f"qkv must be contiguous in (P, H, d), got strides {qkv.stride()}")
    entries = 1 if split >= n else 2
    for name, t, shape in (
        ("weight", weight, (parts - 1, d)),
        ("bias", bias, (parts - 1, d)),
        ("cos", cos, (n, d // 2)),
        ("sin", sin, (n, d // 2)),
    ):
        if t is not None:
            _check_contiguous(name, t)
            rows = (entries,) if t.ndim == 3 else ()
            if t.dtype != torch.float32 or t.shape[-2:] != shape or (rows and len(t) < entries):
                raise InputError(f"{name} must be float32 {(*rows, *shape)}, got {t.dtype} {tuple(t.shape)}")
    _call("qk_norm_rope", *map(_view, (out, qkv, weight, bias, cos, sin)), split, eps)
