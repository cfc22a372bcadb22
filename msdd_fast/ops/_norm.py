"""Arguments of a group norm with affine and modulation: ``group_norm_modulate_silu`` and ``convolution`` share them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from msdd_fast.backends.choice import Verdict
from msdd_fast.errors import InputError
from msdd_fast.ops._checks import FLOAT_DTYPES, check_device, check_floating

MAX_CHANNELS = 4096


def check_map(name: str, x: Tensor) -> None:
    """A tensor (B, C, H, W) of any floating point dtype; only the batch may be empty."""
    check_floating(name, x)
    if x.ndim != 4 or 0 in x.shape[1:]:
        raise InputError(f"{name} must be a tensor (B, C, H, W), got {tuple(x.shape)}")


def check_groups(groups: int, channels: int, of: str = "x") -> None:
    """An int >= 1 that divides the channels."""
    if isinstance(groups, bool) or not isinstance(groups, int) or groups < 1 or channels % groups:
        raise InputError(f"groups must be an int that divides the {channels} channels of {of}, got {groups!r}")


def check_channels(name: str, t: Tensor | None, channels: int, x: Tensor) -> None:
    """(channels,) on the device of x, or None."""
    if t is not None:
        check_floating(name, t)
        check_device(name, t, "x", x)
        if t.shape != (channels,):
            raise InputError(f"{name} must be ({channels},), got {tuple(t.shape)}")


def check_modulation(scale: Tensor | None, shift: Tensor | None, channels: int, x: Tensor) -> None:
    """Both (B, channels) or (B, channels, h, w), h and w dividing those of x; or both None."""
    if (scale is None) != (shift is None):
        raise InputError("scale and shift must be given or left out together")
    if scale is not None and shift is not None:
        _check_table("scale", scale, channels, x)
        _check_table("shift", shift, channels, x)
        if shift.shape != scale.shape:
            raise InputError(f"shift must have the shape of scale, {tuple(scale.shape)}, got {tuple(shift.shape)}")


def _check_table(name: str, t: Tensor, channels: int, x: Tensor) -> None:
    check_floating(name, t)
    check_device(name, t, "x", x)
    b, _, height, width = x.shape
    fits = t.ndim in (2, 4) and t.shape[:2] == (b, channels)
    if not fits or (t.ndim == 4 and (0 in t.shape[2:] or height % t.shape[2] or width % t.shape[3])):
        expected = f"({b}, {channels}) or ({b}, {channels}, h, w) with h and w dividing {height} and {width}"
        raise InputError(f"{name} must be {expected}, got {tuple(t.shape)}")


def as_cells(table: Tensor | None) -> Tensor | None:
    """Scale or shift as (B, C, h, w)."""
    return table[:, :, None, None] if table is not None and table.ndim == 2 else table


def float_dtypes_fit(args: Sequence[Any]) -> Verdict:
    """Whether every tensor among the arguments is float32, bfloat16 or float16."""
    other = next((t.dtype for t in args if isinstance(t, Tensor) and t.dtype not in FLOAT_DTYPES), None)
    return other is None, f"works in float32, bfloat16 and float16, got {other}"


def channels_fit(channels: int) -> Verdict:
    return channels <= MAX_CHANNELS, f"takes at most {MAX_CHANNELS} channels, got {channels}"
