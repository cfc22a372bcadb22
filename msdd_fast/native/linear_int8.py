"""The C++ ``linear_int8`` and the rounding of its weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from msdd_fast.backends.extension import load_extension
from msdd_fast.errors import InputError
from msdd_fast.native._call import (
    Native,
    Result,
    entry,
    like,
    metadata,
    operand,
    optional_metadata,
    prepared,
    prepared_into,
)

DEPTH = 64  # as QUANTIZED_DEPTH in csrc/include/msdd_fast/linear_int8.h


def pack_linear_int8(weight: Tensor, swiglu: bool = False, level: str = "") -> Tensor:
    """The weight (out, in) rounded to 8 bits with a scale for each row, as ``linear_int8`` reads it.

    Words in one dimension, which are no numbers. ``swiglu`` as in ``pack_linear``; ``level`` (linear_int8.h) is for
    tests.
    """
    (*_, strides), shape = metadata("weight", weight), tuple(weight.shape)
    if len(shape) != 2 or (strides[1] != 1 and shape[1] > 1):
        raise InputError(f"weight must be (out, in) with adjacent elements in a row, got {shape}, strides {strides}")
    try:
        words = load_extension().linear_int8_packed_words(*shape, swiglu, level)
    except ValueError as error:
        raise InputError(f"linear_int8_pack: {error}") from None
    packed = torch.empty(words, dtype=torch.float32, device="cpu")
    entry("linear_int8_pack")(operand(packed), operand(weight), swiglu, level)
    return packed


def _rounded(rows: int, width: int) -> tuple[Result, Result]:
    """Values and scales."""
    return like((rows, -(-width // DEPTH) * DEPTH), torch.uint8), like((rows,), torch.float32)


@Native
def quantize_rows(x: Tensor) -> Callable[..., tuple[Tensor, Tensor]]:
    """(values, scales) of rows x (R, in): uint8 (R, in padded to a multiple of DEPTH) about 128, and float32 (R,)."""
    of_x = metadata("x", x)
    if x.ndim != 2:
        raise InputError(f"x must be (R, in), got {tuple(x.shape)}")
    rounded = _rounded(*x.shape)
    return prepared("quantize_rows", rounded, *(r.metadata() for r in rounded), of_x)


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
    quantize, (rows, inputs) = quantize_rows.prepare(x), x.shape
    of_packed, of_bias = metadata("packed", packed), optional_metadata("bias", bias)
    arguments = *(r.metadata() for r in _rounded(rows, inputs)), of_packed, of_bias, features, inputs, swiglu, level
    if out is not None:
        multiply = prepared_into("linear_int8", metadata("out", out), *arguments)
    else:
        made = like((rows, features // 2 if swiglu else features), x.dtype)
        multiply = prepared("linear_int8", made, made.metadata(), *arguments)
    return lambda x, *others: multiply(*quantize(x), *others)
