"""final_step: the last Euler step of a decode, from patch rows to the image that leaves it (paper Eq. 4 and 5).

    E = x + dt * v,  or  x + dt * (v_uncond + scale * (v - v_uncond)) with guidance
    out[b, c, Y*p + py, X*p + px] = E[Y*g + X, b, (c*p + py)*p + px]

x, v, v_uncond (N, B, C*p*p), N = g*g, each float32, bfloat16 or float16; the velocities may be slices such as v[:, :B],
which are read in place. out (B, C, g*p, g*p), contiguous or in NHWC memory order: a float dtype, rounded once and not
clamped, or uint8 as ``images.to_uint8`` makes it, clamp(127.5 E + 128, 0, 255) truncated
(docs/spec.md#quantise-pixels). float32 inside. Moves 3 elements for each element of x (4 with guidance), one of
them of the dtype of ``out``. The eager reference is differentiable but for uint8.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from msdd_fast import native
from msdd_fast.backends.triton import TRITON
from msdd_fast.diffusion.checks import check_bool
from msdd_fast.diffusion.patch_rows import unpatchify_rows
from msdd_fast.errors import InputError
from msdd_fast.layout import with_contiguous_rows
from msdd_fast.ops._checks import FLOAT_DTYPES, check_blocks
from msdd_fast.ops._example import normals
from msdd_fast.ops._native import register_native
from msdd_fast.ops._patches import (
    check_patch_size,
    check_rows,
    check_velocity,
    euler_eager,
    to_uint8,
)
from msdd_fast.ops._registry import Op


def final_step(
    x: Tensor,
    v: Tensor,
    dt: float | Tensor,
    patch_size: int,
    out_dtype: torch.dtype,
    v_uncond: Tensor | None = None,
    scale: float | Tensor | None = None,
    *,
    channels_last: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Image (B, C, H, H) after the last step.

    Args:
        x: (N, B, C*p*p), N a square number.
        v, v_uncond: like x, any of the float dtypes; ``v_uncond`` and ``scale`` only with guidance, then both.
        dt, scale: numbers, or float tensors of one element on x's device.
        patch_size: p.
        out_dtype: float32, bfloat16, float16 or uint8.
        channels_last: write in NHWC memory order; the shape stays.

    Raises InputError for anything else.
    """
    check_patch_size(patch_size, even=False)
    check_rows(x, patch_size)
    side = math.isqrt(x.shape[0]) * patch_size
    check_blocks(x.shape[2] // patch_size**2, side, side)
    dt, scale = check_velocity(x, v, dt, v_uncond, scale)
    if not isinstance(out_dtype, torch.dtype) or out_dtype not in (*FLOAT_DTYPES, torch.uint8):
        raise InputError(f"out_dtype must be float32, bfloat16, float16 or uint8, got {out_dtype!r:.80}")
    check_bool("channels_last", channels_last)
    out: Tensor = OP(x, v, dt, patch_size, out_dtype, v_uncond, scale, channels_last, backend=backend)
    return out


def final_step_eager(
    x: Tensor,
    v: Tensor,
    dt: Tensor,
    patch_size: int,
    out_dtype: torch.dtype,
    v_uncond: Tensor | None = None,
    scale: Tensor | None = None,
    channels_last: bool = False,
) -> Tensor:
    """Reference: plain torch."""
    image = unpatchify_rows(euler_eager(x, v, dt, v_uncond, scale), patch_size)
    image = to_uint8(image) if out_dtype == torch.uint8 else image.to(out_dtype)
    return image.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def _fake(
    x: Tensor,
    v: Tensor,
    dt: Tensor,
    patch_size: int,
    out_dtype: torch.dtype,
    v_uncond: Tensor | None = None,
    scale: Tensor | None = None,
    channels_last: bool = False,
) -> Tensor:
    side = math.isqrt(x.shape[0]) * patch_size
    order = torch.channels_last if channels_last else torch.contiguous_format
    shape = (x.shape[1], x.shape[2] // patch_size**2, side, side)
    return torch.empty(shape, dtype=out_dtype, device=x.device, memory_format=order)


def _contiguous(
    x: Tensor,
    v: Tensor,
    dt: Tensor,
    patch_size: int,
    out_dtype: torch.dtype,
    v_uncond: Tensor | None = None,
    scale: Tensor | None = None,
    channels_last: bool = False,
) -> tuple[Any, ...]:
    """The arguments as the kernels read them; copies only what is laid out otherwise."""
    v, v_uncond = with_contiguous_rows(v), None if v_uncond is None else with_contiguous_rows(v_uncond)
    return x.contiguous(), v, dt, patch_size, out_dtype, v_uncond, scale, channels_last


def _triton(*args: Any) -> Tensor:
    from msdd_fast.kernels.final_step import final_step as launch

    return launch(*_contiguous(*args))


def _example() -> tuple[Any, ...]:
    x, v, v_uncond = normals(*[(4, 2, 48)] * 3)  # 2 x 2 patches of 4 pixels
    return x, v, torch.tensor(0.5), 4, torch.float32, v_uncond, torch.tensor(1.5)


OP = Op(
    "final_step",
    "(Tensor x, Tensor v, Tensor dt, int patch_size, ScalarType out_dtype, Tensor? v_uncond=None, "
    "Tensor? scale=None, bool channels_last=False) -> Tensor",
    final_step_eager,
    _fake,
    _example,
)
register_native(OP, native.final_step, _contiguous)
OP.register(TRITON, _triton)
