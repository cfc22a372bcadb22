"""The C++ ``cfg_euler``, which cfg_combine and euler_step share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from msdd_fast.errors import InputError
from msdd_fast.layout import RowLayout, memory_order, row_layout
from msdd_fast.native._call import DTYPES, GIVEN, Native, check_scalars, like, metadata, prepared

_ABSENT = (0, 0, 0, 0)


@Native
def cfg_euler(
    x: Tensor | None, v_cond: Tensor, v_uncond: Tensor | None, scale: Tensor | None, dt: Tensor | None
) -> Callable[..., Tensor]:
    """x + dt * v, or v if x and dt are None; v = v_uncond + scale * (v_cond - v_uncond), or v_cond if those are None.

    Tensors of one shape: dense in one memory order, or rows that are apart (``layout.row_layout``). Scalars of one
    element. The result has the dtype of the first tensor, and no gaps.
    """
    if (x is None) != (dt is None) or (v_uncond is None) != (scale is None):
        raise InputError("x and dt, v_uncond and scale must be given or left out together")
    check_scalars(scale=scale, dt=dt)
    given = {"x": x, "v_cond": v_cond, "v_uncond": v_uncond}
    codes = {name: metadata(name, t)[1] for name, t in given.items() if t is not None}
    first = v_cond if x is None else x
    layout = _common_layout(given)
    # Of each operand (GIVEN, dtype, row stride, elements). Where rows are apart, the dense result has none.
    strides = dict(zip(codes, layout.strides, strict=True))
    operands = [(GIVEN, codes[n], strides[n], first.numel()) if n in codes else _ABSENT for n in given]
    scalars = 0 if scale is None else GIVEN, 0 if dt is None else GIVEN
    out = like(first.shape, first.dtype, memory_order(first) if layout.rows == 1 else torch.contiguous_format)
    sizes = layout.rows, layout.columns
    return prepared("cfg_euler", out, GIVEN, *operands, *scalars, DTYPES[first.dtype], *sizes)


def _common_layout(given: dict[str, Tensor | None]) -> RowLayout:
    """How the tensors lie; one row if all are dense in one memory order. Raises InputError for different shapes."""
    tensors = {n: t for n, t in given.items() if t is not None}
    name, first = next(iter(tensors.items()))
    for other, t in tensors.items():
        if t.shape != first.shape:
            raise InputError(f"{other} must have the shape of {name}, {tuple(first.shape)}, got {tuple(t.shape)}")
    layout = row_layout(*tensors.values())
    if layout is not None:
        return layout
    order = memory_order(first)
    if not first.is_contiguous(memory_format=order):
        raise InputError(f"{name} must be contiguous or channels-last, got strides {first.stride()}")
    for other, t in tensors.items():
        if not t.is_contiguous(memory_format=order):
            raise InputError(f"{other} must have the memory order {order} of {name}, got strides {t.stride()}")
    return RowLayout(1, first.numel(), (0,) * len(tensors))
