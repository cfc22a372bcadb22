"""The C++ ``swiglu``."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from msdd_fast.errors import InputError
from msdd_fast.native._call import GIVEN, Native, like, metadata, prepared


@Native
def swiglu(a: Tensor, b: Tensor, shape: tuple[int, ...] | None = None) -> Callable[..., Tensor]:
    """silu(a) * b for a and b (R, I) of one dtype, the elements of a row adjacent; contiguous.

    ``shape`` of the result, with as many elements as a, instead of (R, I).
    """
    shape = tuple(a.shape) if shape is None else shape
    if math.prod(shape) != a.numel():
        raise InputError(f"shape must hold the {a.numel()} elements of a, got {shape}")
    return prepared("swiglu", like(shape, a.dtype), GIVEN, metadata("a", a), metadata("b", b))
