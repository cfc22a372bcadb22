"""Calls the C++ ``cfg_euler``."""

from __future__ import annotations

import torch
from torch import Tensor

from msdd_fast.errors import InputError
from msdd_fast.layout import RowLayout, row_layout
from msdd_fast.native._call import _DTYPES, _call, _check, _check_cpu


def cfg_euler(
    x: Tensor | None, v_cond: Tensor, v_uncond: Tensor | None, scale: Tensor | None, dt: Tensor | None
) -> Tensor:
    """x + dt * v, or v if x and dt are None; v = v_uncond + scale * (v_cond - v_uncond), or v_cond if those are None.

    Tensors of one shape and memory order (contiguous or channels-last), scalars of one element. Contiguous ones may
    also be views whose rows are apart (``rows.row_layout``). The result has the dtype of the first tensor, and no gaps.
    """
    if (x is None) != (dt is None) or (v_uncond is None) != (scale is None):
        raise InputError("x and dt, v_uncond and scale must be given or left out together")
    given = {n: t for n, t in (("x", x), ("v_cond", v_cond), ("v_uncond", v_uncond)) if t is not None}
    for name, t in given.items():
        _check_cpu(name, t)
    name, first = next(iter(given.items()))
    for other, t in given.items():
        if t.shape != first.shape:
            raise InputError(f"{other} must have the shape of {name}, {tuple(first.shape)}, got {tuple(t.shape)}")
    layout = row_layout(*given.values())
    if layout is None:
        memory = _check(name, first)
        for other, t in given.items():
            if not t.is_contiguous(memory_format=memory):
                raise InputError(f"{other} must have the memory order {memory} of {name}, got strides {t.stride()}")
        layout = RowLayout(1, first.numel(), (0,) * len(given))
    order = torch.contiguous_format if layout.rows > 1 else torch.preserve_format
    out = torch.empty_like(first, memory_format=order)
    strides = dict(zip(given, layout.strides, strict=True))
    operands = [
        (given[n].data_ptr(), _DTYPES[given[n].dtype], strides[n], given[n].numel()) if n in given else (0, 0, 0, 0)
        for n in ("x", "v_cond", "v_uncond")
    ]
    scalars = [0.0 if s is None else s.item() for s in (scale, dt)]
    if out.numel():  # the address of an empty tensor is 0, which would mean a missing one
        _call("cfg_euler", out.data_ptr(), _DTYPES[out.dtype], *operands, layout.rows, layout.columns, *scalars)
    return out
