"""Calls the C++ ``start_noise``."""

from __future__ import annotations

import torch
from torch import Tensor

from msdd_fast.errors import InputError
from msdd_fast.native._call import _DTYPES, _call, _check_seeds, _seeds


def start_noise(
    seeds: Tensor, channels: int, height: int, width: int, dtype: torch.dtype, patch_size: int | None = None
) -> Tensor:
    """White unit normals (B, C, H, W) for int64 seeds (B,), H and W even, dtype float32, bfloat16 or float16.

    With ``patch_size`` the same numbers as patch rows (H/p * W/p, B, C*p*p), p even.
    Raises InputError on anything else, BackendUnavailableError if the extension is missing, as all functions here.
    """
    seeds = _check_seeds(seeds)
    if dtype not in _DTYPES:
        raise InputError(f"dtype must be float32, bfloat16 or float16, got {dtype}")
    if min(channels, height, width) < 0:
        raise InputError(f"channels, height and width must not be negative, got {(channels, height, width)}")
    sizes = (len(seeds), channels, height, width)
    if patch_size is None:
        out = torch.empty(sizes, dtype=dtype, device="cpu")
        _call("start_noise", out.data_ptr(), _DTYPES[dtype], _seeds(seeds), *sizes)
        return out
    if patch_size < 2 or patch_size % 2 or height % patch_size or width % patch_size:
        raise InputError(f"patch_size must be an even divisor of {height} and {width}, got {patch_size}")
    tokens = height // patch_size * (width // patch_size)
    out = torch.empty(tokens, len(seeds), channels * patch_size**2, dtype=dtype, device="cpu")
    _call("start_noise_rows", out.data_ptr(), _DTYPES[dtype], _seeds(seeds), *sizes, patch_size)
    return out
