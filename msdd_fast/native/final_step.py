"""The C++ ``final_step``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from msdd_fast.errors import InputError
from msdd_fast.native._call import PIXEL_TYPES, Native, check_scalars, dense_layout, entry
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
    call = entry("final_step")
    of_x, of_v, of_uncond, shape = patch_operands(x, v, v_uncond, scale, patch_size)
    if out_dtype not in PIXEL_TYPES:
        raise InputError(f"out_dtype must be float32, bfloat16, float16 or uint8, got {out_dtype}")
    pixel = PIXEL_TYPES[out_dtype]
    grid, batch, channels, _ = shape
    order = torch.channels_last if channels_last else torch.contiguous_format
    layout = dense_layout((batch, channels, grid * patch_size, grid * patch_size), order)
    filled = x.numel() > 0

    def run(x: Tensor, v: Tensor, dt: Tensor, v_uncond: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
        out = x.new_empty_strided(*layout, dtype=out_dtype)
        if filled:
            call(
                out.data_ptr(),
                pixel,
                channels_last,
                (x.data_ptr(), *of_x),
                (v.data_ptr(), *of_v),
                None if v_uncond is None or of_uncond is None else (v_uncond.data_ptr(), *of_uncond),
                shape,
                dt.data_ptr(),
                0 if scale is None else scale.data_ptr(),
            )
        return out

    return run
