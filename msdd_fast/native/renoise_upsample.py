"""Calls the C++ ``renoise_upsample``."""

from __future__ import annotations

import torch
from torch import Tensor

from msdd_fast.errors import InputError
from msdd_fast.native._call import _call, _check, _check_seeds, _seeds, _view


def renoise_upsample(x: Tensor, alpha: Tensor, beta: Tensor, seeds: Tensor, stage: int, correlation: float) -> Tensor:
    """alpha * nearest_x2(x) + beta * noise, (B, C, 2H, 2W), in the dtype and memory order of x.

    x (B, C, H, W), contiguous or channels-last; alpha and beta of one element; seeds int64 (B,).
    """
    order = _check("x", x)
    seeds = _check_seeds(seeds)
    if x.ndim != 4 or len(seeds) != len(x):
        raise InputError(f"x must be (B, C, H, W) with one seed per image, got {tuple(x.shape)}, {len(seeds)} seeds")
    b, c, h, w = x.shape
    out = torch.empty(b, c, 2 * h, 2 * w, dtype=x.dtype, device="cpu", memory_format=order)
    operands = (out.data_ptr(), _view(x), order is torch.channels_last, _seeds(seeds))
    _call("renoise_upsample", *operands, alpha.item(), beta.item(), stage, correlation)
    return out
