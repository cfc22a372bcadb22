"""Calls the C++ ``linear``."""

from __future__ import annotations

import torch
from torch import Tensor

from msdd_fast.backends import load_extension
from msdd_fast.errors import InputError
from msdd_fast.native._call import _DTYPES, _call, _check_cpu, _view

_BY_CODE = {code: dtype for dtype, code in _DTYPES.items()}


def pack_linear(weight: Tensor, swiglu: bool = False, level: str = "") -> Tensor:
    """The weight (out, in) as ``linear`` reads it: one dimension; bfloat16, or float32 for what has no such products.

    Where ``level`` (linear.h, for tests) is empty, it is that of this machine. ``swiglu`` packs [w1; w3] so that their
    products meet in registers.
    """
    _check_cpu("weight", weight)
    if weight.ndim != 2 or (weight.stride(1) != 1 and weight.shape[1] > 1):
        expected = "(out, in) with adjacent elements in a row"
        raise InputError(f"weight must be {expected}, got {tuple(weight.shape)}, strides {weight.stride()}")
    try:
        sizes = load_extension().linear_packed_size(*weight.shape, swiglu, _DTYPES[weight.dtype], level)
    except ValueError as error:
        raise InputError(f"linear_pack: {error}") from None
    packed = torch.empty(sizes[0], dtype=_BY_CODE[sizes[1]], device="cpu")
    _call("linear_pack", _view(packed), _view(weight), swiglu, level)
    return packed


def linear(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    features: int,
    swiglu: bool = False,
    out: Tensor | None = None,
    level: str = "",
) -> Tensor:
    """x W^T + bias for rows x (R, in) and ``pack_linear(weight)`` of a weight (features, in) in x's dtype.

    With ``swiglu``, silu(x W1^T + b1) * (x W3^T + b3), (R, features / 2). bias (features,) or None. Rows of x and of
    ``out`` may be apart; ``out`` is new, in x's dtype, unless given, and then of any float dtype. Summed in float32,
    rounded once.
    """
    operands = (x, packed) if bias is None else (x, packed, bias)
    for name, t in zip(("x", "packed", "bias"), operands, strict=False):
        _check_cpu(name, t)
    if x.ndim != 2:
        raise InputError(f"x must be (R, in), got {tuple(x.shape)}")
    if out is not None:
        _check_cpu("out", out)
    else:
        out = torch.empty(len(x), features // 2 if swiglu else features, dtype=x.dtype, device="cpu")
    _call("linear", *map(_view, (out, x, packed, bias)), features, swiglu, level)
    return out
