"""Checks of latents, noise and sampling arguments."""

from __future__ import annotations

import functools
import math
import operator
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from msdd_fast.diffusion.config import Config
from msdd_fast.errors import InputError

LATENT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_finite(name: str, x: Tensor) -> None:
    """Raise InputError that names the first item of the batch with NaN or Inf. Waits for a GPU.

    Passes everything under torch.compile and torch.export: what depends on values would break the graph.
    """
    if torch.compiler.is_compiling():
        return
    first = first_not_finite(x)
    if first is not None:
        raise InputError(f"{name} must be finite, got NaN or Inf in item {first}")


def first_not_finite(x: Tensor) -> int | None:
    """Index of the first item of the batch with NaN or Inf; None if there is none. Waits for a GPU."""
    if torch.isfinite(x).all():
        return None
    return int((~torch.isfinite(x)).flatten(1).any(dim=1).nonzero()[0])


def as_int(name: str, value: Any, minimum: int) -> int:
    """``value`` as an int. Integers of NumPy and integer tensors of one element are integers, too; bools are not.

    Raises InputError for anything else and for less than ``minimum``.
    """
    number = value if type(value) is int else _index(value)
    if number is None or number < minimum:
        raise InputError(f"{name} must be an integer >= {minimum}, got {value!r}")
    return number


def _index(value: Any) -> int | None:
    """What ``value`` is as an index; None if it is none, or a bool."""
    is_bool = isinstance(value, bool) or str(getattr(value, "dtype", "")) in ("bool", "torch.bool")
    try:
        return None if is_bool else operator.index(value)
    except Exception:  # each library has its own for what is not an integer
        return None


def as_number(name: str, value: Any, expected: str = "a number") -> float:
    """``value`` as a float: a number of Python or NumPy, or a tensor of one element. Raises InputError for others."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if hasattr(value, "dtype") and str(value.dtype) not in ("bool", "torch.bool") and not _is_complex(value):
        try:
            return float(value)
        except Exception:  # each library has its own for what is not one number
            pass
    raise InputError(f"{name} must be {expected}, got {_shown(value)}")


def _is_complex(value: Any) -> bool:
    return "complex" in str(value.dtype)


def _shown(value: Any) -> str:
    """How a message shows a value: tensors and arrays by their shape, since they may be large."""
    shape = getattr(value, "shape", None)
    return f"{type(value).__name__} of shape {tuple(shape)}" if shape else repr(value)


def check_sampling(steps: Any, cfg_scale: Any) -> tuple[int, float]:
    """(steps, cfg_scale) as an int >= 1 and a finite float >= 0. Raises InputError for anything else."""
    steps = as_int("steps", steps, 1)
    scale = as_number("cfg_scale", cfg_scale, "a finite number >= 0")
    if not math.isfinite(scale) or scale < 0:
        raise InputError(f"cfg_scale must be a finite number >= 0, got {cfg_scale!r}")
    return steps, scale


def check_strided(name: str, x: Any, kind: str = "a torch.Tensor") -> None:
    """Raise InputError unless ``x`` is a tensor with strides and data: not sparse, nested, of MKL-DNN or on meta."""
    if not isinstance(x, Tensor):
        raise InputError(f"{name} must be {kind}, got {type(x).__name__}")
    check_layout(name, x)
    if x.device.type == "meta":
        raise InputError(f"{name} must hold data, got a tensor on the meta device")


def check_layout(name: str, x: Tensor) -> None:
    """Raise InputError for a sparse, nested, quantised or MKL-DNN tensor."""
    if x.is_nested:
        raise InputError(f"{name} must be a dense tensor, got a nested one")
    if x.layout != torch.strided:
        raise InputError(f"{name} must be a dense tensor, got the layout {x.layout}")
    if x.is_quantized:
        raise InputError(f"{name} must be a floating point tensor, got a quantised one")


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
    check_strided("images", images)
    if not images.is_floating_point():
        raise InputError(f"images must be floating point in [-1, 1], got {images.dtype}")
    _check_float("images", images)


def check_image_range(images: Tensor) -> None:
    """Raise InputError for values beyond 1.5; warn, once a process, if all values are in [0, 1]. Waits for a GPU.

    Not under torch.compile, as ``check_finite``.

    Images are in [-1, 1]. Resampling may overshoot a little, pixels in [0, 255] or normalised otherwise are far off.
    """
    if torch.compiler.is_compiling() or not images.numel():
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
    check_strided("z", z)
    sizes = z.shape[1:]
    if z.ndim != 1 + len(shape) or any(n < 1 if s is None else n != s for n, s in zip(sizes, shape, strict=True)):
        free = iter("hw")
        expected = ", ".join(next(free) if s is None else str(s) for s in shape)
        raise InputError(f"z must have shape (B, {expected}), got {tuple(z.shape)}")
    _check_float("z", z)


def check_noise(noise: Sequence[Tensor], batch: int, shapes: list[tuple[int, int, int]]) -> None:
    """Raise InputError unless there is one tensor (batch, *shape) for each of ``shapes``."""
    if not isinstance(noise, (list, tuple)):
        raise InputError(f"noise must be a list of {len(shapes)} tensors, one per stage, got {type(noise).__name__}")
    if len(noise) != len(shapes):
        raise InputError(f"noise must hold {len(shapes)} tensors, one per stage, got {len(noise)}")
    for s, (n, shape) in enumerate(zip(noise, shapes, strict=True)):
        check_strided(f"noise[{s}]", n)
        if n.shape != (batch, *shape):
            raise InputError(f"noise[{s}] must have shape {(batch, *shape)}, got {tuple(n.shape)}")
        _check_float(f"noise[{s}]", n)


def _check_float(name: str, x: Tensor) -> None:
    if not x.is_floating_point():
        raise InputError(f"{name} must be floating point, got {x.dtype}")
    if x.dtype not in LATENT_DTYPES:
        raise InputError(f"{name} must be float32, bfloat16, float16 or float64, got {x.dtype}")


def check_bool(name: str, value: object) -> None:
    """Raise InputError unless ``value`` is True or False."""
    if not isinstance(value, bool):
        raise InputError(f"{name} must be True or False, got {value!r:.80}")
