"""Calls the C++ ``window_attention``."""

from __future__ import annotations

from torch import Tensor

from msdd_fast.errors import InputError
from msdd_fast.layout import attention_result
from msdd_fast.native._call import _call, _check_cpu, _view


def window_attention(q: Tensor, k: Tensor, v: Tensor, table: Tensor, height: int, width: int) -> Tensor:
    """Attention over the window round each of height * width pixels; memory order of ``attention_result(q)``.

    q, k, v (B, N, heads, d): one dtype, any strides but the last, which is 1. table (2w - 1, 2w - 1, heads), any
    strides.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        _check_cpu(name, x)
        fits = x.ndim == 4 and x.shape == q.shape and x.shape[1] == height * width and x.dtype == q.dtype
        if not fits or (x.stride(3) != 1 and x.numel()):
            expected = f"(B, {height * width}, heads, d) in q's dtype and shape with the last dimension contiguous"
            raise InputError(f"{name} must be {expected}, got {x.dtype} {tuple(x.shape)}, strides {x.stride()}")
    _check_cpu("table", table)
    span = table.shape[0]
    if table.shape != (span, span, q.shape[2]) or span % 2 == 0:
        raise InputError(f"table must be (2w - 1, 2w - 1, {q.shape[2]}), got {tuple(table.shape)}")
    out = attention_result(q)
    if out.numel():
        _call("window_attention", *map(_view, (out, q, k, v, table)), height, width)
    return out
