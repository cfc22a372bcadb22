"""Weights of one model as the start of another."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@torch.no_grad()
def take_what_fits(model: nn.Module, state: Mapping[str, Tensor]) -> list[str]:
    """Copy the tensors of ``state`` that ``model`` has in the same shape, and return the names of all others it has.

    A patch embedding for smaller patches is taken, too: it then sees its patches shrunk by box means to that size.
    """
    missing = []
    for name, own in model.state_dict().items():
        theirs = state.get(name)
        if theirs is not None and own.ndim == 4 and own.shape[:2] == theirs.shape[:2]:
            theirs = _for_patches(theirs, own.shape[-1])
        if theirs is None or theirs.shape != own.shape:
            missing.append(name)
        else:
            own.copy_(theirs)
    return missing


def _for_patches(weight: Tensor, size: int) -> Tensor:
    """Weight (D, C, p, p) for patches of ``size`` pixels, if that is a multiple of p."""
    factor, rest = divmod(size, weight.shape[-1])
    if rest or weight.shape[-1] != weight.shape[-2]:
        return weight
    return F.interpolate(weight, scale_factor=float(factor), mode="nearest") / factor**2
