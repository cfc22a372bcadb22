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
from msdd_fast.layout import dense, memory_order
from msdd_fast.ops._checks import check_eps
from msdd_fast.ops._example import normals
from msdd_fast.ops._native import register_native
from msdd_fast.ops._norm import (
    as_cells,
    channels_fit,
    check_channels,
    check_groups,
    check_map,
    check_modulation,
    float_dtypes_fit,
)
from msdd_fast.ops._registry import Op, all_of


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
    check_map("x", x)
    channels = x.shape[1]
    check_groups(groups, channels)
    eps = check_eps(eps)
    check_channels("weight", weight, channels, x)
    check_channels("bias", bias, channels, x)
    check_modulation(scale, shift, channels, x)
    check_bool("silu", silu)
    out: Tensor = OP(x, groups, eps, weight, bias, scale, shift, silu, backend=backend)
    return out


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
    return dense(x), groups, eps, weight, bias, as_cells(scale), as_cells(shift), silu


def _triton(*args: Any) -> Tensor:
    from msdd_fast.kernels.group_norm_modulate_silu import group_norm_modulate_silu as launch

    return launch(*_contiguous(*args))


def _kernels_fit(x: Tensor, *others: Any) -> Verdict:
    height, width = x.shape[2:]
    pixels = height * width <= 2**30, f"takes at most 2^30 pixels, got {height} x {width}"
    return all_of(float_dtypes_fit((x, *others)), channels_fit(x.shape[1]), pixels)


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
