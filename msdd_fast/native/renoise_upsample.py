"""The C++ ``renoise_upsample``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from msdd_fast.errors import InputError
from msdd_fast.layout import memory_order
from msdd_fast.native._call import Native, check_scalars, check_seeds, dense_layout, entry, metadata


@Native
def renoise_upsample(
    x: Tensor, alpha: Tensor, beta: Tensor, seeds: Tensor, stage: int, correlation: float
) -> Callable[..., Tensor]:
    """alpha * nearest_x2(x) + beta * noise, (B, C, 2H, 2W), in the dtype and memory order of x.

    x (B, C, H, W), contiguous or channels-last; alpha and beta of one element; seeds int64 (B,), contiguous.
    """
    check_scalars(alpha=alpha, beta=beta)
    call, of_x, count = entry("renoise_upsample"), metadata("x", x), check_seeds(seeds)
    if x.ndim != 4:
        raise InputError(f"x must be (B, C, H, W), got {tuple(x.shape)}")
    b, c, h, w = x.shape
    order = memory_order(x)
    last, layout = order is torch.channels_last, dense_layout((b, c, 2 * h, 2 * w), order)

    def run(x: Tensor, alpha: Tensor, beta: Tensor, seeds: Tensor) -> Tensor:
        out = x.new_empty_strided(*layout)
        noise = (alpha.data_ptr(), beta.data_ptr(), stage, correlation)
        call(out.data_ptr(), (x.data_ptr(), *of_x), last, (seeds.data_ptr(), count), *noise)
        return out

    return run
