"""Argument checks that several ops share: one text for every backend."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from msdd_fast.diffusion.checks import as_number, check_layout
from msdd_fast.diffusion.noise import correlation_factors
from msdd_fast.errors import InputError

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_image(name: str, x: Tensor) -> None:
    """(B, C, H, W) in float32, bfloat16 or float16."""
    check_float(name, x)
    if x.ndim != 4:
        raise InputError(f"{name} must be a tensor (B, C, H, W), got {tuple(x.shape)}")


def check_floating(name: str, x: Tensor) -> None:
    """A tensor of any floating point dtype: eager takes all of them, a kernel says which it takes."""
    check_tensor(name, x)
    if not x.dtype.is_floating_point:
        raise InputError(f"{name} must have a floating point dtype, got {x.dtype}")
    if x.dtype.itemsize == 1:  # PyTorch does not calculate in it
        raise InputError(f"{name} must have a floating point dtype of 16 bits or more, got {x.dtype}")


def check_float(name: str, x: Tensor) -> None:
    """A tensor in float32, bfloat16 or float16."""
    check_tensor(name, x)
    check_dtype(name, x.dtype)


def check_tensor(name: str, x: Tensor) -> None:
    """A dense tensor with strides: not sparse, nested, quantised or of MKL-DNN."""
    if not isinstance(x, Tensor):
        raise InputError(f"{name} must be a tensor, got {type(x).__name__}")
    check_layout(name, x)


def check_dtype(name: str, dtype: torch.dtype) -> None:
    if dtype not in FLOAT_DTYPES:
        raise InputError(f"{name} must be float32, bfloat16 or float16, got {dtype}")


def check_like(name: str, y: Tensor, reference: str, x: Tensor) -> None:
    """Same shape and device as the reference; any of the float dtypes."""
    check_float(name, y)
    if y.shape != x.shape:
        raise InputError(f"{name} must have the shape of {reference}, {tuple(x.shape)}, got {tuple(y.shape)}")
    check_device(name, y, reference, x)


def check_device(name: str, y: Tensor, reference: str, x: Tensor) -> None:
    if y.device != x.device:
        raise InputError(f"{name} must be on the device of {reference}, {x.device}, got {y.device}")


def check_eps(eps: float) -> float:
    """A finite number >= 0."""
    number = as_number("eps", eps, "a finite number >= 0")
    if not math.isfinite(number) or number < 0:
        raise InputError(f"eps must be a finite number >= 0, got {eps!r}")
    return number


def check_correlation(correlation: float) -> float:
    """A number in [-1/3, 1), as ``noise.correlation_factors`` takes it."""
    number = as_number("correlation", correlation, "a number in [-1/3, 1)")
    correlation_factors(number)
    return number


def check_seeds(seeds: Tensor, batch: int | None = None) -> None:
    """int64 (batch,). Values are checked where they can be read without waiting for a GPU, on the CPU."""
    if not isinstance(seeds, Tensor) or seeds.dtype != torch.int64 or seeds.ndim != 1:
        got = f"{seeds.dtype} {tuple(seeds.shape)}" if isinstance(seeds, Tensor) else type(seeds).__name__
        raise InputError(f"seeds must be an int64 tensor (B,), got {got}")
    check_layout("seeds", seeds)
    if batch is not None and len(seeds) != batch:
        raise InputError(f"seeds must hold {batch} values, one per image, got {len(seeds)}")
    traced = torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
    readable = seeds.device.type == "cpu" and not traced and type(seeds) is Tensor
    if readable and len(seeds) and int(seeds.min()) < 0:
        raise InputError(f"seeds must be in [0, 2^63), got {int(seeds.min())}")


def check_stage(stage: int) -> None:
    """An index that fits into one word of the noise's counter."""
    if isinstance(stage, bool) or not isinstance(stage, int) or not 0 <= stage < 2**32:
        raise InputError(f"stage must be an int in [0, 2^32), got {stage!r}")


def check_blocks(channels: int, height: int, width: int) -> None:
    """At most 2^30 blocks of 2x2 pixels in an image: inside one, kernels count in signed 32-bit integers."""
    if channels * (height // 2) * (width // 2) > 2**30:
        raise InputError(f"shape must hold at most 2^30 blocks of 2x2 pixels, got {(channels, height, width)}")


def as_scalar(name: str, value: float | Tensor, device: torch.device) -> Tensor:
    """A float32 tensor () on ``device``. Raises InputError for what is not one number.

    Pass a tensor where the value varies: a float is frozen into a graph."""
    if isinstance(value, Tensor):
        if value.dtype == torch.float32 and value.ndim == 0 and value.device == device:
            return value
        if value.numel() != 1:
            raise InputError(f"{name} must be one number, got a tensor of shape {tuple(value.shape)}")
        if value.device != device:
            raise InputError(f"{name} must be on {device}, got {value.device}")
        check_layout(name, value)
        if value.dtype.is_complex:
            raise InputError(f"{name} must be a real number, got {value.dtype}")
        return value.to(torch.float32).reshape(())
    return torch.tensor(as_number(name, value), dtype=torch.float32, device=device)
