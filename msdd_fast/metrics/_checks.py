"""Checks that the metrics share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from msdd_fast.errors import InputError


def check_pair(x: Tensor, y: Tensor) -> None:
    """Raise InputError unless both are (B, 3, H, W) of one shape."""
    if x.ndim != 4 or x.shape[1] != 3 or x.shape != y.shape:
        raise InputError(
            f"images must be two tensors of one shape (B, 3, H, W), got {tuple(x.shape)} and {tuple(y.shape)}"
        )


def in_float32(forward: Callable[[Any, Tensor, Tensor], Tensor]) -> Callable[[Any, Tensor, Tensor], Tensor]:
    """Decorate a distance's ``forward``: the caller's autocast, which would round small distances, has no effect."""

    @functools.wraps(forward)
    def wrapped(self: Any, x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return forward(self, x, y)

    return wrapped
