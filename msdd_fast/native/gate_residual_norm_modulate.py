"""Calls the C++ ``gate_residual_norm_modulate``."""

from __future__ import annotations

from torch import Tensor

from msdd_fast.native._call import _like, _norm_modulate


def gate_residual_norm_modulate(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, run: int, eps: float
) -> tuple[Tensor, Tensor]:
    """x_new = x + gate * y and norm_modulate(x_new); y like x, but of any dtype."""
    x_new, h = _like(x), _like(x)
    _norm_modulate(h, x_new, x, y, gate, shift, scale, run, eps)
    return x_new, h
