"""The C++ ``swiglu``."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from msdd_fast.errors import InputError
from msdd_fast.native._call import Native, dense_layout, entry, metadata


@Native
def swiglu(a: Tensor, b: Tensor, shape: tuple[int, ...] | None = None) -> Callable[..., Tensor]:
    """silu(a) * b for a and b (R, I) of one dtype, the elements of a row adjacent; contiguous.

    ``shape`` of the result, with as many elements as a, instead of (R, I).
    """
    call = entry("swiglu")
    shape = tuple(a.shape) if shape is None else shape
    if math.prod(shape) != a.numel():
        raise InputError(f"shape must hold the {a.numel()} elements of a, got {shape}")
    layout = dense_layout(shape)
    of_a, of_b = metadata("a", a), metadata("b", b)

    def run(a: Tensor, b: Tensor) -> Tensor:
        out = a.new_empty_strided(*layout)
        call(out.data_ptr(), (a.data_ptr(), *of_a), (b.data_ptr(), *of_b))
        return out

    return run
