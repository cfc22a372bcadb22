"""Checks of latents, noise and sampling arguments."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from msdd_fast.diffusion.config import Config
from msdd_fast.errors import InputError


def check_finite(name: str, x: Tensor) -> None:
    """Raise InputError that names the first item of the batch with NaN or Inf. Waits for a GPU."""
    if not torch.isfinite(x).all():
        bad = int((~torch.isfinite(x)).flatten(1).any(dim=1).nonzero()[0])
        raise InputError(f"{name} must be finite, got NaN or Inf in item {bad}")


def check_sampling(steps: int, cfg_scale: float) -> None:
    """Raise InputError unless steps is an int >= 1 and cfg_scale a finite number >= 0."""
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise InputError(f"steps must be an integer >= 1, got {steps!r}")
    if not isinstance(cfg_scale, (int, float)) or not math.isfinite(cfg_scale) or cfg_scale < 0:
        raise InputError(f"cfg_scale must be a finite number >= 0, got {cfg_scale!r}")


def check_guidance(config: Config, cfg_scale: float) -> None:
    """Raise InputError for a CFG scale other than 1 where there is no null context to guide away from."""
    if cfg_scale != 1.0 and not config.has_null_context:
        name = config.family.upper()
        raise InputError(f"cfg_scale must be 1 for an {name} tokenizer (it has no null context), got {cfg_scale!r}")


def shape_of(x: object) -> object:
    """What an error message says that it got: a tensor's shape, or the name of another type."""
    return tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__


def check_floating_images(images: Tensor) -> None:
    """Raise InputError for an integer dtype."""
    if not images.is_floating_point():
        raise InputError(f"images must be floating point in [-1, 1], got {images.dtype}")


def check_image_range(images: Tensor) -> None:
    """Raise InputError for values beyond 1.5; warn, once a process, if all values are in [0, 1]. Waits for a GPU.

    Images are in [-1, 1]. Resampling may overshoot a little, pixels in [0, 255] or normalised otherwise are far off.
    """
    if not images.numel():
        return
    low, high = (float(v) for v in images.aminmax())
    if high > 1.5 or low < -1.5:
        raise InputError(
            f"images must be in [-1, 1], got {low:g} to {high:g}; pixels in [0, 255] become x / 127.5 - 1, in [0, 1] "
            "2 * x - 1"
        )
    if low >= 0 and low < high <= 1:
        _warn_of_unit_range()


@functools.cache
def _warn_of_unit_range() -> None:
    warnings.warn(
        "all values of the images are in [0, 1], but images must be in [-1, 1]: if they are pixels in [0, 1], encode "
        "2 * x - 1 (this is said once)",
        stacklevel=5,
    )


def check_latents(z: Tensor, *shape: int | None) -> None:
    """Raise InputError unless ``z`` is a floating (B, *shape) tensor; None stands for any positive size."""
    if not isinstance(z, Tensor):
        raise InputError(f"z must be a torch.Tensor, got {type(z).__name__}")
    sizes = z.shape[1:]
    if z.ndim != 1 + len(shape) or any(n < 1 if s is None else n != s for n, s in zip(sizes, shape, strict=True)):
        free = iter("hw")
        expected = ", ".join(next(free) if s is None else str(s) for s in shape)
        raise InputError(f"z must have shape (B, {expected}), got {tuple(z.shape)}")
    if not z.is_floating_point():
        raise InputError(f"z must be floating point, got {z.dtype}")


def check_noise(noise: Sequence[Tensor], batch: int, shapes: list[tuple[int, int, int]]) -> None:
    """Raise InputError unless there is one tensor (batch, *shape) for each of ``shapes``."""
    if len(noise) != len(shapes):
        raise InputError(f"noise must hold {len(shapes)} tensors, one per stage, got {len(noise)}")
    for s, (n, shape) in enumerate(zip(noise, shapes, strict=True)):
        if n.shape != (batch, *shape):
            raise InputError(f"noise[{s}] must have shape {(batch, *shape)}, got {tuple(n.shape)}")
