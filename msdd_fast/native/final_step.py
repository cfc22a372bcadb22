"""The C++ ``final_step``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from msdd_fast.errors import InputError
from msdd_fast.native._call import GIVEN, PIXEL_TYPES, Native, check_scalars, like, prepared
from msdd_fast.native._patches import patch_operands


@Native
def final_step(
    x: Tensor,
    v: Tensor,
    dt: Tensor,
    patch_size: int,
    out_dtype: torch.dtype,
    v_uncond: Tensor | None,
    scale: Tensor | None,
    channels_last: bool,
) -> Callable[..., Tensor]:
    """The last Euler step of patch rows (N, B, C*p*p), as an image (B, C, H, H) of a float dtype or uint8."""
    check_scalars(dt=dt, scale=scale)
    of_x, of_v, of_uncond, shape = patch_operands(x, v, v_uncond, scale, patch_size)
    if out_dtype not in PIXEL_TYPES:
        raise InputError(f"out_dtype must be float32, bfloat16, float16 or uint8, got {out_dtype}")
    grid, batch, channels, _ = shape
    order = torch.channels_last if channels_last else torch.contiguous_format
    out = like((batch, channels, grid * patch_size, grid * patch_size), out_dtype, order)
    guidance = of_uncond, 0 if scale is None else GIVEN
    kind = PIXEL_TYPES[out_dtype], channels_last
    return prepared("final_step", out, GIVEN, of_x, of_v, GIVEN, *guidance, shape, *kind)
