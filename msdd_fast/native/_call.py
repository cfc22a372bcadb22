"""Torch wrappers of the C++ functions: check what protects memory here, pass addresses and sizes there.

CPU tensors only. The ops of the same names (msdd_fast.ops) state formulas and check values for every backend.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from msdd_fast.backends import load_extension
from msdd_fast.errors import InputError

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as in csrc/include/msdd_fast/dtype.h


_PIXEL_TYPES = {**_DTYPES, torch.uint8: 3}  # as in csrc/include/msdd_fast/final_step.h


def _norm_modulate(
    h: Tensor,
    x_new: Tensor | None,
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    run: int,
    eps: float,
) -> None:
    width = x.shape[-1]
    if y is not None:
        _check_contiguous("y", y)
        if y.shape != x.shape:
            raise InputError(f"y must have the shape of x, {tuple(x.shape)}, got {tuple(y.shape)}")
    for name, t in (("gate", gate), ("shift", shift), ("scale", scale)):
        if t is not None:
            _check_cpu(name, t)
            if t.shape != (len(shift), width) or t.stride(1) != 1:
                raise InputError(
                    f"{name} must be {(len(shift), width)} with adjacent elements in a row, "
                    f"got {tuple(t.shape)}, strides {t.stride()}"
                )
    if x.numel():
        out = 0 if x_new is None else x_new.data_ptr()
        _call("norm_modulate", h.data_ptr(), out, *map(_view, (x, y, gate, shift, scale)), run, eps)


_View = tuple[int, int, tuple[int, ...], tuple[int, ...]]


def _patch_operands(
    x: Tensor, v: Tensor, v_uncond: Tensor | None, scale: Tensor | None, patch_size: int
) -> tuple[list[_View | None], tuple[int, int, int, int]]:
    """The views of the three, and (grid, batch, channels, patch). Raises InputError."""
    if (v_uncond is None) != (scale is None):
        raise InputError("v_uncond and scale must be given or left out together")
    for name, t in (("x", x), ("v", v), ("v_uncond", v_uncond)):
        if t is None:
            continue
        _check_cpu(name, t)
        if t.ndim != 3 or t.shape != x.shape or (t.shape[2] > 1 and t.stride(2) != 1):
            expected = f"(N, B, C*p*p) of {tuple(x.shape)} with contiguous features"
            raise InputError(f"{name} must be {expected}, got {tuple(t.shape)}, strides {t.stride()}")
    tokens, batch, features = x.shape
    grid = math.isqrt(tokens)
    if patch_size < 1 or grid**2 != tokens or features % patch_size**2:
        raise InputError(f"x must be (g*g, B, C*p*p) with p = {patch_size}, got {tuple(x.shape)}")
    return [_view(t) for t in (x, v, v_uncond)], (grid, batch, features // patch_size**2, patch_size)


def _call(name: str, *args: Any) -> None:
    """Run a function of the extension on as many threads as torch uses; what it refuses becomes an InputError."""
    function = getattr(load_extension(), name)
    try:
        function(*args, threads=torch.get_num_threads())
    except ValueError as error:
        raise InputError(f"{name}: {error}") from None


def _check(name: str, x: Tensor) -> torch.memory_format:
    """Memory order of a CPU tensor that is dense and of a dtype that the extension knows. Raises InputError."""
    _check_cpu(name, x)
    if x.is_contiguous():
        return torch.contiguous_format
    if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    raise InputError(f"{name} must be contiguous or channels-last, got shape {tuple(x.shape)}, strides {x.stride()}")


def _check_cpu(name: str, x: Tensor) -> None:
    """A CPU tensor of a dtype that the extension knows."""
    if not isinstance(x, Tensor) or x.device.type != "cpu" or x.dtype not in _DTYPES:
        got = f"{x.dtype} on {x.device}" if isinstance(x, Tensor) else type(x).__name__
        raise InputError(f"{name} must be a float32, bfloat16 or float16 tensor on the CPU, got {got}")


def _check_contiguous(name: str, x: Tensor) -> None:
    _check_cpu(name, x)
    if not x.is_contiguous():
        raise InputError(f"{name} must be contiguous, got shape {tuple(x.shape)}, strides {x.stride()}")


def _like(x: Tensor) -> Tensor:
    """An empty tensor like ``x``, which must be contiguous."""
    _check_contiguous("x", x)
    return torch.empty_like(x)


def _view(x: Tensor | None) -> _View | None:
    """Address, dtype, shape and strides, as binding.cpp takes a tensor."""
    return None if x is None else (x.data_ptr(), _DTYPES[x.dtype], x.shape, x.stride())


def _seeds(seeds: Tensor) -> tuple[int, int]:
    """Address and count."""
    return seeds.data_ptr(), len(seeds)


def _check_seeds(seeds: Tensor) -> Tensor:
    """int64 (B,) on the CPU, made contiguous."""
    if not isinstance(seeds, Tensor) or seeds.dtype != torch.int64 or seeds.ndim != 1 or seeds.device.type != "cpu":
        is_tensor = isinstance(seeds, Tensor)
        got = f"{seeds.dtype} {tuple(seeds.shape)} on {seeds.device}" if is_tensor else type(seeds).__name__
        raise InputError(f"seeds must be an int64 tensor (B,) on the CPU, got {got}")
    return seeds.contiguous()
