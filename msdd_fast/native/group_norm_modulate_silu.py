"""The C++ ``group_norm_modulate_silu``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from msdd_fast.layout import memory_order
from msdd_fast.native._call import Native, entry, metadata, optional_metadata


@Native
def group_norm_modulate_silu(
    x: Tensor,
    groups: int,
    eps: float,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    silu: bool,
) -> Callable[..., Tensor]:
    """GroupNorm of x (B, C, H, W), contiguous or channels-last, affine, modulation and SiLU, in x's dtype and order.

    weight and bias (C,), contiguous; scale and shift (B, C, h, w) with any strides, h and w dividing H and W.
    """
    call, order, of_x = entry("group_norm_modulate_silu"), memory_order(x), metadata("x", x)
    last = order is torch.channels_last
    given = {"weight": weight, "bias": bias, "scale": scale, "shift": shift}
    of_others = [optional_metadata(name, t) for name, t in given.items()]
    if not x.numel():
        return lambda x, *_: torch.empty_like(x, memory_format=order)

    def run(x: Tensor, *others: Tensor) -> Tensor:
        out, present = torch.empty_like(x, memory_format=order), iter(others)
        operands = [None if of is None else (next(present).data_ptr(), *of) for of in of_others]
        call(out.data_ptr(), (x.data_ptr(), *of_x), *operands, groups, last, silu, eps)
        return out

    return run
