"""Calls the C++ ``group_norm_modulate_silu``."""

from __future__ import annotations

import torch
from torch import Tensor

from msdd_fast.errors import InputError
from msdd_fast.native._call import _call, _check, _check_contiguous, _check_cpu, _view


def group_norm_modulate_silu(
    x: Tensor,
    groups: int,
    eps: float,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    silu: bool,
) -> Tensor:
    """GroupNorm of x (B, C, H, W), contiguous or channels-last, affine, modulation and SiLU, in x's dtype and order.

    weight and bias (C,), contiguous; scale and shift (B, C, h, w) with any strides, h and w dividing H and W.
    """
    order = _check("x", x)
    if x.ndim != 4:
        raise InputError(f"x must be (B, C, H, W), got {tuple(x.shape)}")
    b, c, _, _ = x.shape
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None:
            _check_contiguous(name, t)
            if t.shape != (c,):
                raise InputError(f"{name} must be ({c},), got {tuple(t.shape)}")
    rows, columns = (1, 1) if scale is None else scale.shape[2:]
    for name, t in (("scale", scale), ("shift", shift)):
        if t is not None:
            _check_cpu(name, t)
            if t.shape != (b, c, rows, columns):
                raise InputError(f"{name} must be {(b, c, rows, columns)}, got {tuple(t.shape)}")
    out = torch.empty_like(x, memory_format=order)
    if out.numel():
        operands = map(_view, (x, weight, bias, scale, shift))
        _call("group_norm_modulate_silu", out.data_ptr(), *operands, groups, order is torch.channels_last, silu, eps)
    return out
