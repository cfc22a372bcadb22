"""Calls the C++ ``final_step``."""

from __future__ import annotations

import torch
from torch import Tensor

from msdd_fast.errors import InputError
from msdd_fast.native._call import _PIXEL_TYPES, _call, _patch_operands


def final_step(
    x: Tensor,
    v: Tensor,
    dt: Tensor,
    patch_size: int,
    out_dtype: torch.dtype,
    v_uncond: Tensor | None,
    scale: Tensor | None,
    channels_last: bool,
) -> Tensor:
    """The last Euler step of patch rows (N, B, C*p*p), as an image (B, C, H, H) of a float dtype or uint8."""
    operands, shape = _patch_operands(x, v, v_uncond, scale, patch_size)
    if out_dtype not in _PIXEL_TYPES:
        raise InputError(f"out_dtype must be float32, bfloat16, float16 or uint8, got {out_dtype}")
    grid, batch, channels, _ = shape
    order = torch.channels_last if channels_last else torch.contiguous_format
    side = grid * patch_size
    out = torch.empty(batch, channels, side, side, dtype=out_dtype, device="cpu", memory_format=order)
    if out.numel():
        euler = (dt.item(), 0.0 if scale is None else scale.item())
        _call("final_step", out.data_ptr(), _PIXEL_TYPES[out_dtype], channels_last, *operands, shape, *euler)
    return out
