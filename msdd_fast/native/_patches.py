"""What the native functions on patch rows (N, B, C*p*p) share."""

from __future__ import annotations

import math

from torch import Tensor

from msdd_fast.errors import InputError
from msdd_fast.native._call import Metadata, metadata, optional_metadata

PatchShape = tuple[int, int, int, int]


def patch_operands(
    x: Tensor, v: Tensor, v_uncond: Tensor | None, scale: Tensor | None, patch_size: int
) -> tuple[Metadata, Metadata, Metadata | None, PatchShape]:
    """Metadata of the three, and (grid, batch, channels, patch). Raises InputError for sizes that are none."""
    if (v_uncond is None) != (scale is None):
        raise InputError("v_uncond and scale must be given or left out together")
    of_x = metadata("x", x)
    tokens, batch, features = x.shape if x.ndim == 3 else (-1, 0, 0)
    grid = math.isqrt(max(0, tokens))
    if patch_size < 1 or grid**2 != tokens or features % patch_size**2:
        raise InputError(f"x must be (g*g, B, C*p*p) with p = {patch_size}, got {tuple(x.shape)}")
    shape = (grid, batch, features // patch_size**2, patch_size)
    return of_x, metadata("v", v), optional_metadata("v_uncond", v_uncond), shape
