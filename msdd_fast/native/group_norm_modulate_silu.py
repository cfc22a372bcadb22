"""The C++ ``group_norm_modulate_silu``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from msdd_fast.layout import memory_order
from msdd_fast.native._call import GIVEN, Native, like, metadata, optional_metadata, prepared


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
    order = memory_order(x)
    given = {"weight": weight, "bias": bias, "scale": scale, "shift": shift}
    operands = [metadata("x", x), *(optional_metadata(name, t) for name, t in given.items())]
    last, out = order is torch.channels_last, like(x.shape, x.dtype, order)
    return prepared("group_norm_modulate_silu", out, GIVEN, *operands, groups, last, silu, eps)
