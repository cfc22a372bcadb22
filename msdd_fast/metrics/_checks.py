"""Checks that the metrics share."""

from __future__ import annotations

from torch import Tensor

from msdd_fast.errors import InputError


def check_pair(x: Tensor, y: Tensor) -> None:
    """Raise InputError unless both are (B, 3, H, W) of one shape."""
    if x.ndim != 4 or x.shape[1] != 3 or x.shape != y.shape:
        raise InputError(
            f"images must be two tensors of one shape (B, 3, H, W), got {tuple(x.shape)} and {tuple(y.shape)}"
        )
