"""A random crop of two batches."""

from __future__ import annotations

import torch
from torch import Tensor


def random_crop(x: Tensor, y: Tensor, size: int | None, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The same random square of ``size`` pixels of both (..., H, W), or all of them if they are not larger."""
    height, width = x.shape[-2:]
    if size is None or size >= min(height, width):
        return x, y
    draw = torch.rand(2, generator=generator).tolist()
    top, left = int(draw[0] * (height - size + 1)), int(draw[1] * (width - size + 1))
    window = (..., slice(top, top + size), slice(left, left + size))
    return x[window], y[window]
