"""group_norm_modulate_silu: GroupNorm, modulation at the latent resolution and SiLU (docs/spec.md#ssdd-network).

    y = (x - mean) / sqrt(var + eps) * weight[c] + bias[c]      mean and var of C / groups channels of an image
    out = silu(y * (1 + scale[b, c, i h // H, j w // W]) + shift[...])

x (B, C, H, W) in NCHW or NHWC memory order, which out keeps; copied first if it lies otherwise. weight, bias (C,) or
None. scale and shift (B, C, h, w) with H % h == W % w == 0, or (B, C), the same everywhere, or None; any strides, so
they may be channels of one wide tensor, and they are never brought to the size of x. x, weight, bias, scale and shift
each float32, bfloat16 or float16 (eager: any float dtype); out has x's.

Kernels calculate in float32: in pieces of the image the mean, then the squares about it, and the pieces put together
about the common mean, so a large mean costs no accuracy. They round once; eager rounds after every operation and is
differentiable. Moves 3 B C H W elements of x's dtype, reading x twice, and, h w / (H W) times as often, the tables.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from msdd_fast import native
from msdd_fast.backends.choice import Verdict
from msdd_fast.backends.triton import TRITON
from msdd_fast.diffusion.checks import check_bool
from msdd_fast.errors import InputError
from msdd_fast.layout import dense, memory_order
from msdd_fast.ops._checks import FLOAT_DTYPES, check_device, check_eps, check_floating
from msdd_fast.ops._example import normals
from msdd_fast.ops._native import register_native
from msdd_fast.ops._registry import Op

MAX_CHANNELS = 4096


def group_norm_modulate_silu(
    x: Tensor,
    groups: int,
    eps: float,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    silu: bool = True,
    *,
    backend: str | None = None,
) -> Tensor:
    """The normalised, modulated and activated x.

    Args:
        x: (B, C, H, W).
        groups: divides C.
        eps: added to the variance.
        weight, bias: (C,) or None.
        scale, shift: (B, C, h, w) or (B, C), of one shape; both or neither.
        silu: False leaves the activation out.

    Raises InputError for anything else.
    """
    check_floating("x", x)
    if x.ndim != 4 or 0 in x.shape[1:]:
        raise InputError(f"x must be a tensor (B, C, H, W), got {tuple(x.shape)}")
    if isinstance(groups, bool) or not isinstance(groups, int) or groups < 1 or x.shape[1] % groups:
        raise InputError(f"groups must be an int that divides the {x.shape[1]} channels of x, got {groups!r}")
    eps = check_eps(eps)
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None:
            check_floating(name, t)
            check_device(name, t, "x", x)
            if t.shape != x.shape[1:2]:
                raise InputError(f"{name} must be ({x.shape[1]},), got {tuple(t.shape)}")
    if (scale is None) != (shift is None):
        raise InputError("scale and shift must be given or left out together")
    if scale is not None and shift is not None:
        _check_table("scale", scale, x)
        _check_table("shift", shift, x)
        if shift.shape != scale.shape:
            raise InputError(f"shift must have the shape of scale, {tuple(scale.shape)}, got {tuple(shift.shape)}")
    check_bool("silu", silu)
    out: Tensor = OP(x, groups, eps, weight, bias, scale, shift, silu, backend=backend)
    return out


def _check_table(name: str, t: Tensor, x: Tensor) -> None:
    check_floating(name, t)
    check_device(name, t, "x", x)
    b, c, height, width = x.shape
    fits = t.ndim in (2, 4) and t.shape[:2] == (b, c)
    if not fits or (t.ndim == 4 and (0 in t.shape[2:] or height % t.shape[2] or width % t.shape[3])):
        expected = f"({b}, {c}) or ({b}, {c}, h, w) with h and w dividing {height} and {width}"
        raise InputError(f"{name} must be {expected}, got {tuple(t.shape)}")


def group_norm_modulate_silu_eager(
    x: Tensor,
    groups: int,
    eps: float,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    silu: bool = True,
) -> Tensor:
    """Reference: plain torch, rounded after every operation as the dtype has it."""
    weight, bias = (None if t is None else t.to(x.dtype) for t in (weight, bias))
    h = torch.group_norm(x, groups, weight, bias, eps)  # F.group_norm refuses a single pixel
    if scale is not None and shift is not None:
        h = h * (1 + _to_pixels(scale, x)) + _to_pixels(shift, x)
    h = (F.silu(h) if silu else h).to(x.dtype)
    return h.contiguous(memory_format=memory_order(x))


def _to_pixels(table: Tensor, x: Tensor) -> Tensor:
    """One value for every pixel, or one for all."""
    if table.ndim == 2:
        return table[:, :, None, None]
    return table if table.shape[2:] == x.shape[2:] else F.interpolate(table, x.shape[2:], mode="nearest")


def _cells(table: Tensor | None) -> Tensor | None:
    """(B, C, h, w)."""
    return table[:, :, None, None] if table is not None and table.ndim == 2 else table


def _contiguous(
    x: Tensor,
    groups: int,
    eps: float,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    silu: bool = True,
) -> tuple[Any, ...]:
    """The arguments as the kernels read them; copies only what is laid out otherwise."""
    weight, bias = (None if t is None else t.contiguous() for t in (weight, bias))
    return dense(x), groups, eps, weight, bias, _cells(scale), _cells(shift), silu


def _triton(*args: Any) -> Tensor:
    from msdd_fast.kernels.group_norm_modulate_silu import group_norm_modulate_silu as launch

    return launch(*_contiguous(*args))


def _kernels_fit(x: Tensor, *others: Any) -> Verdict:
    for t in (x, *others):
        if isinstance(t, Tensor) and t.dtype not in FLOAT_DTYPES:
            return False, f"works in float32, bfloat16 and float16, got {t.dtype}"
    if x.shape[1] > MAX_CHANNELS:
        return False, f"takes at most {MAX_CHANNELS} channels, got {x.shape[1]}"
    if x.shape[2] * x.shape[3] > 2**30:
        return False, f"takes at most 2^30 pixels, got {x.shape[2]} x {x.shape[3]}"
    return True, ""


def _example() -> tuple[Any, ...]:
    x, weight, bias, scale, shift = normals((2, 3, 4, 6), (3,), (3,), (2, 3, 2, 3), (2, 3, 2, 3))
    return x, 3, 1e-5, weight, bias, scale, shift, True


OP = Op(
    "group_norm_modulate_silu",
    "(Tensor x, int groups, float eps, Tensor? weight=None, Tensor? bias=None, Tensor? scale=None, "
    "Tensor? shift=None, bool silu=True) -> Tensor",
    group_norm_modulate_silu_eager,
    lambda x, *_: torch.empty_like(x, memory_format=memory_order(x)),
    _example,
)
register_native(OP, native.group_norm_modulate_silu, _contiguous, _kernels_fit)
OP.register(TRITON, _triton, _kernels_fit)
