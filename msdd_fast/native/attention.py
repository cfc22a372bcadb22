"""Calls the C++ ``attention``."""

from __future__ import annotations

from torch import Tensor

from msdd_fast.errors import InputError
from msdd_fast.layout import attention_result
from msdd_fast.native._call import _call, _check_cpu, _view


def attention(q: Tensor, k: Tensor, v: Tensor, accumulate: Tensor | None = None, level: str = "") -> Tensor:
    """softmax(q k^T / sqrt(d)) v, plus ``accumulate``, rounded once; memory order of ``attention_result(q)``.

    q (B, Nq, H, d), k and v (B, Nk, H, d), accumulate like q: one dtype, any strides but the last, which is 1. Nothing
    is copied. Nk >= 1; d a multiple of 16 up to 128. ``level`` (attention.h) is for tests.
    """
    operands = {"q": q, "k": k, "v": v} if accumulate is None else {"q": q, "k": k, "v": v, "accumulate": accumulate}
    for name, x in operands.items():
        _check_cpu(name, x)
        if x.ndim != 4 or x.dtype != q.dtype or (x.stride(3) != 1 and x.numel()):
            expected = f"(B, N, H, d) in q's dtype, {q.dtype}, with the last dimension contiguous"
            raise InputError(f"{name} must be {expected}, got {x.dtype} {tuple(x.shape)}, strides {x.stride()}")
        shape = q.shape if name == "accumulate" else (q.shape[0], k.shape[1], *q.shape[2:])
        if name != "q" and x.shape != shape:
            raise InputError(f"{name} must have the shape {tuple(shape)}, got {tuple(x.shape)}")
    out = attention_result(q)
    _call("attention", *map(_view, (out, q, k, v, accumulate)), level)
    return out
