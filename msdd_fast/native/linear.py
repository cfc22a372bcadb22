"""The C++ ``linear`` and the packing of its weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from msdd_fast.backends.extension import load_extension
from msdd_fast.errors import InputError
from msdd_fast.native._call import (
    DTYPES,
    Native,
    entry,
    like,
    metadata,
    operand,
    optional_metadata,
    prepared,
    prepared_into,
)

_BY_CODE = {code: dtype for dtype, code in DTYPES.items()}


def pack_linear(weight: Tensor, swiglu: bool = False, level: str = "") -> Tensor:
    """The weight (out, in) as ``linear`` reads it, in one dimension.

    bfloat16 stays so where the machine multiplies pairs of it; all else becomes float32. ``swiglu`` packs [w1; w3] so
    that both products of a column end in one tile. ``level`` (linear.h) is for tests.
    """
    (_, code, _, strides), shape = metadata("weight", weight), tuple(weight.shape)
    if len(shape) != 2 or (strides[1] != 1 and shape[1] > 1):
        raise InputError(f"weight must be (out, in) with adjacent elements in a row, got {shape}, strides {strides}")
    try:
        size, packed_code = load_extension().linear_packed_size(*shape, swiglu, code, level)
    except ValueError as error:
        raise InputError(f"linear_pack: {error}") from None
    packed = torch.empty(size, dtype=_BY_CODE[packed_code], device="cpu")
    entry("linear_pack")(operand(packed), operand(weight), swiglu, level)
    return packed


@Native
def linear(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    features: int,
    swiglu: bool = False,
    out: Tensor | None = None,
    level: str = "",
) -> Callable[..., Tensor]:
    """x W^T + bias for rows x (R, in) and ``pack_linear(weight)`` of a weight (features, in) in x's dtype.

    With ``swiglu``, silu(x W1^T + b1) * (x W3^T + b3), (R, features / 2). bias (features,) or None. Rows of x and of
    ``out`` may be apart; ``out`` is new, in x's dtype, unless given, and then of any float dtype. Summed in float32,
    rounded once.
    """
    of_x, of_packed, of_bias = metadata("x", x), metadata("packed", packed), optional_metadata("bias", bias)
    if x.ndim != 2:
        raise InputError(f"x must be (R, in), got {tuple(x.shape)}")
    arguments = of_x, of_packed, of_bias, features, swiglu, level
    if out is not None:
        return prepared_into("linear", metadata("out", out), *arguments)
    made = like((len(x), features // 2 if swiglu else features), x.dtype)
    return prepared("linear", made, made.metadata(), *arguments)
