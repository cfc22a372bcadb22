"""The C++ ``start_noise``, as images or as patch rows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from msdd_fast.errors import InputError
from msdd_fast.native._call import DTYPES, GIVEN, Native, check_seeds, like, prepared


@Native
def start_noise(
    seeds: Tensor, channels: int, height: int, width: int, dtype: torch.dtype, patch_size: int | None = None
) -> Callable[..., Tensor]:
    """White unit normals (B, C, H, W) for int64 seeds (B,), H and W even, dtype float32, bfloat16 or float16.

    With ``patch_size`` the same numbers as patch rows (H/p * W/p, B, C*p*p), p even.
    """
    of_seeds = check_seeds(seeds)
    if dtype not in DTYPES:
        raise InputError(f"dtype must be float32, bfloat16 or float16, got {dtype}")
    if min(channels, height, width) < 0:
        raise InputError(f"channels, height and width must not be negative, got {(channels, height, width)}")
    sizes = len(seeds), channels, height, width
    if patch_size is None:
        return prepared("start_noise", like(sizes, dtype), GIVEN, of_seeds, DTYPES[dtype], *sizes)
    if patch_size < 2 or patch_size % 2 or height % patch_size or width % patch_size:
        raise InputError(f"patch_size must be an even divisor of {height} and {width}, got {patch_size}")
    rows = like((height // patch_size * (width // patch_size), len(seeds), channels * patch_size**2), dtype)
    return prepared("start_noise_rows", rows, GIVEN, of_seeds, DTYPES[dtype], *sizes, patch_size)
