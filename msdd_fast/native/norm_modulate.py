"""Calls the C++ ``norm_modulate``."""

from __future__ import annotations

from torch import Tensor

from msdd_fast.native._call import _like, _norm_modulate


def norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, run: int, eps: float) -> Tensor:
    """LayerNorm over the last dimension of x, contiguous, then * (1 + scale) + shift; row r takes min(r // run, G - 1).

    Tables (G, D), the elements of a row adjacent.
    """
    h = _like(x)
    _norm_modulate(h, None, x, None, None, shift, scale, run, eps)
    return h
