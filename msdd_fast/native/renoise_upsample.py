"""The C++ ``renoise_upsample``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from msdd_fast.errors import InputError
from msdd_fast.layout import memory_order
from msdd_fast.native._call import GIVEN, Native, check_scalars, check_seeds, like, metadata, prepared


@Native
def renoise_upsample(
    x: Tensor, alpha: Tensor, beta: Tensor, seeds: Tensor, stage: int, correlation: float
) -> Callable[..., Tensor]:
    """alpha * nearest_x2(x) + beta * noise, (B, C, 2H, 2W), in the dtype and memory order of x.

    x (B, C, H, W), contiguous or channels-last; alpha and beta of one element; seeds int64 (B,), contiguous.
    """
    check_scalars(alpha=alpha, beta=beta)
    of_x, of_seeds = metadata("x", x), check_seeds(seeds)
    if x.ndim != 4:
        raise InputError(f"x must be (B, C, H, W), got {tuple(x.shape)}")
    b, c, h, w = x.shape
    order = memory_order(x)
    last, out = order is torch.channels_last, like((b, c, 2 * h, 2 * w), x.dtype, order)
    return prepared("renoise_upsample", out, GIVEN, of_x, GIVEN, GIVEN, of_seeds, last, stage, correlation)
