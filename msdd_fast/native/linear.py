"""The C++ ``linear`` and the packing of its weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from msdd_fast.backends.extension import load_extension
from msdd_fast.errors import InputError
from msdd_fast.native._call import DTYPES, Native, entry, metadata, operand, optional_metadata

_BY_CODE = {code: dtype for dtype, code in DTYPES.items()}


def pack_linear(weight: Tensor, swiglu: bool = False, level: str = "") -> Tensor:
    """The weight (out, in) as ``linear`` reads it, in one dimension.

    bfloat16 stays so where the machine multiplies pairs of it; all else becomes float32. ``swiglu`` packs [w1; w3] so
    that both products of a column end in one tile. ``level`` (linear.h) is for tests.
    """
    code, shape, strides = metadata("weight", weight)
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
    call = entry("linear")
    of_x, of_packed, of_bias = metadata("x", x), metadata("packed", packed), optional_metadata("bias", bias)
    if len(of_x[1]) != 2:
        raise InputError(f"x must be (R, in), got {of_x[1]}")
    width = features // 2 if swiglu else features
    of_out = (of_x[0], (of_x[1][0], width), (width, 1)) if out is None else metadata("out", out)

    given = out is not None  # not the tensor itself, which would be kept
    x_code, x_shape, x_strides = of_x
    packed_code, packed_shape, packed_strides = of_packed
    out_code, out_shape, out_strides = of_out

    def run(x: Tensor, packed: Tensor, *rest: Tensor) -> Tensor:
        to = rest[-1] if given else x.new_empty_strided(out_shape, out_strides)
        call(
            (to.data_ptr(), out_code, out_shape, out_strides),
            (x.data_ptr(), x_code, x_shape, x_strides),
            (packed.data_ptr(), packed_code, packed_shape, packed_strides),
            None if of_bias is None else (rest[0].data_ptr(), *of_bias),
            features,
            swiglu,
            level,
        )
        return to

    return run
