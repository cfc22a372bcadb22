"""Calls the C++ ``swiglu``."""

from __future__ import annotations

import torch
from torch import Tensor

from msdd_fast.errors import InputError
from msdd_fast.native._call import _call, _check_cpu, _view


def swiglu(a: Tensor, b: Tensor) -> Tensor:
    """silu(a) * b for a and b (R, I) of one dtype, the elements of a row adjacent; contiguous."""
    for name, x in (("a", a), ("b", b)):
        _check_cpu(name, x)
        if x.shape != a.shape or x.dtype != a.dtype or x.ndim != 2 or x.stride(1) != 1:
            expected = "(R, I), of the shape and dtype of a, with adjacent elements in a row"
            raise InputError(f"{name} must be {expected}, got {x.dtype} {tuple(x.shape)}, strides {x.stride()}")
    out = torch.empty(a.shape, dtype=a.dtype, device="cpu")
    _call("swiglu", out.data_ptr(), _view(a), _view(b))
    return out
