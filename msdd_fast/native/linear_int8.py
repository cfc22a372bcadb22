"""The C++ ``linear_int8`` and the rounding of its weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from msdd_fast.backends.extension import load_extension
from msdd_fast.errors import InputError
from msdd_fast.native._call import DTYPES, PIXEL_TYPES, Metadata, Native, entry, metadata, operand, optional_metadata

DEPTH = 64  # as QUANTIZED_DEPTH in csrc/include/msdd_fast/linear_int8.h


def pack_linear_int8(weight: Tensor, swiglu: bool = False, level: str = "") -> Tensor:
    """The weight (out, in) rounded to 8 bits with a scale for each row, as ``linear_int8`` reads it.

    Words in one dimension, which are no numbers. ``swiglu`` as in ``pack_linear``; ``level`` (linear_int8.h) is for
    tests.
    """
    _, shape, strides = metadata("weight", weight)
    if len(shape) != 2 or (strides[1] != 1 and shape[1] > 1):
        raise InputError(f"weight must be (out, in) with adjacent elements in a row, got {shape}, strides {strides}")
    try:
        words = load_extension().linear_int8_packed_words(*shape, swiglu, level)
    except ValueError as error:
        raise InputError(f"linear_int8_pack: {error}") from None
    packed = torch.empty(words, dtype=torch.float32, device="cpu")
    entry("linear_int8_pack")(operand(packed), operand(weight), swiglu, level)
    return packed


def _rounded(rows: int, width: int) -> tuple[Metadata, Metadata]:
    """Metadata of values and scales."""
    padded = -(-width // DEPTH) * DEPTH
    return (PIXEL_TYPES[torch.uint8], (rows, padded), (padded, 1)), (DTYPES[torch.float32], (rows,), (1,))


@Native
def quantize_rows(x: Tensor) -> Callable[..., tuple[Tensor, Tensor]]:
    """(values, scales) of rows x (R, in): uint8 (R, in padded to a multiple of DEPTH) about 128, and float32 (R,)."""
    call = entry("quantize_rows")
    of_x = metadata("x", x)
    if len(of_x[1]) != 2:
        raise InputError(f"x must be (R, in), got {of_x[1]}")
    of_values, of_scales = _rounded(*of_x[1])

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        values = x.new_empty(of_values[1], dtype=torch.uint8)
        scales = x.new_empty(of_scales[1], dtype=torch.float32)
        call((values.data_ptr(), *of_values), (scales.data_ptr(), *of_scales), (x.data_ptr(), *of_x))
        return values, scales

    return run


@Native
def linear_int8(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    features: int,
    swiglu: bool = False,
    out: Tensor | None = None,
    level: str = "",
) -> Callable[..., Tensor]:
    """``linear`` of x (R, in) rounded by ``quantize_rows`` and ``pack_linear_int8(weight)`` of a weight (features, in).

    The sums of the products are exact; scales, bias and ``swiglu`` are in float32, and the result is rounded once.
    """
    call, quantize = entry("linear_int8"), quantize_rows.prepare(x)
    of_x, of_packed, of_bias = metadata("x", x), metadata("packed", packed), optional_metadata("bias", bias)
    rows, inputs = of_x[1]
    width = features // 2 if swiglu else features
    of_out = (of_x[0], (rows, width), (width, 1)) if out is None else metadata("out", out)
    of_values, of_scales = _rounded(rows, inputs)
    given = out is not None  # not the tensor itself, which would be kept

    def run(x: Tensor, packed: Tensor, *rest: Tensor) -> Tensor:
        to = rest[-1] if given else x.new_empty_strided(*of_out[1:])
        values, scales = quantize(x)
        call(
            (to.data_ptr(), *of_out),
            (values.data_ptr(), *of_values),
            (scales.data_ptr(), *of_scales),
            (packed.data_ptr(), *of_packed),
            None if of_bias is None else (rest[0].data_ptr(), *of_bias),
            features,
            inputs,
            swiglu,
            level,
        )
        return to

    return run
