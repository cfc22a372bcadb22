"""What the ops at the end of a stage share: their checks, and the Euler step of their eager references."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from msdd_fast.errors import InputError
from msdd_fast.ops._checks import as_scalar, check_float, check_like


def check_patch_size(patch_size: int, even: bool) -> None:
    """An int >= 1, or an even one >= 2 where 2x2 blocks of noise must not straddle patches."""
    if isinstance(patch_size, bool) or not isinstance(patch_size, int) or patch_size < 1 or (even and patch_size % 2):
        kind = "an even int >= 2 (noise comes in 2x2 blocks)" if even else "an int >= 1"
        raise InputError(f"patch_size must be {kind}, got {patch_size!r}")


def check_rows(x: Tensor, patch_size: int) -> None:
    """Patch rows (g*g, B, C*p*p) in a float dtype."""
    check_float("x", x)
    square = patch_size * patch_size
    if x.ndim != 3 or math.isqrt(x.shape[0]) ** 2 != x.shape[0] or x.shape[2] % square:
        raise InputError(f"x must be (g*g, B, C*{square}) for patch_size {patch_size}, got {tuple(x.shape)}")


def check_velocity(
    x: Tensor, v: Tensor, dt: float | Tensor, v_uncond: Tensor | None, scale: float | Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """dt and scale as tensors (), once the velocities are like x and guidance is either whole or absent."""
    check_like("v", v, "x", x)
    if (v_uncond is None) != (scale is None):
        raise InputError(f"v_uncond and scale must be given together, got {_kind(v_uncond)} and {_kind(scale)}")
    if v_uncond is not None:
        check_like("v_uncond", v_uncond, "x", x)
    return as_scalar("dt", dt, x.device), None if scale is None else as_scalar("scale", scale, x.device)


def euler_eager(x: Tensor, v: Tensor, dt: Tensor, v_uncond: Tensor | None, scale: Tensor | None) -> Tensor:
    """E = x + dt * v or x + dt * (v_uncond + scale * (v - v_uncond)), float32, not rounded to x's dtype."""
    v = v.float()
    if v_uncond is not None and scale is not None:
        v = v_uncond.float() + scale * (v - v_uncond.float())
    return x.float() + dt * v


def _kind(value: object) -> str:
    return "none" if value is None else type(value).__name__


def to_uint8(x: Tensor) -> Tensor:
    """[-1, 1] to uint8, same shape: clamp(127.5 x + 128, 0, 255) truncated (docs/spec.md#quantise-pixels)."""
    return (x.float() * 127.5 + 128.0).clamp(0, 255).to(torch.uint8)
