"""Safetensors files, and what may serve as weights."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from msdd_fast.errors import CheckpointError
from msdd_fast.io.files import atomic_write

LARGEST_SIZE = 2**63 - 1
"""Of a dimension of a tensor of PyTorch. A file may say more, of tensors without elements."""


@contextmanager
def open_safetensors(path: str | os.PathLike[str]) -> Iterator[Any]:
    """The one way to open a safetensors file.

    Raises what ``safe_open`` does, and SafetensorError for shapes that no tensor has.
    """
    with safe_open(path, framework="pt") as f:
        for name in f.keys():  # noqa: SIM118 (not a dict)
            shape = f.get_slice(name).get_shape()
            if any(size > LARGEST_SIZE for size in shape):
                raise SafetensorError(f"{name} has the shape {tuple(shape)}")
        yield f


def read_safetensors(path: Path, names: Collection[str] | None = None) -> dict[str, Tensor]:
    """The tensors of one safetensors file, all or those of ``names``.

    Raises CheckpointError if it is missing or damaged.
    """
    with _opened(path) as f:
        return {name: f.get_tensor(name) for name in (f.keys() if names is None else names)}


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes in a safetensors file, of which only the header is read. Raises as ``read_safetensors``."""
    with _opened(path) as f:
        return {name: tuple(f.get_slice(name).get_shape()) for name in f.keys()}  # noqa: SIM118 (not a dict)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    path = Path(path)
    try:
        if path.exists() and not path.is_file():
            raise ValueError("not a regular file")
        with open_safetensors(path) as f:
            yield f
    except CheckpointError:
        raise
    except (SafetensorError, OSError, ValueError, RuntimeError) as e:  # PyTorch opens it once more, and raises its own
        if not path.exists():
            raise CheckpointError(f"{path} is missing") from e
        raise CheckpointError(f"{path} is damaged or not a safetensors file: {e}") from e


def write_safetensors(
    tensors: Mapping[str, Tensor], path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None
) -> None:
    """Write one file atomically (``files.atomic_write``). Raises InputError if it cannot be written."""
    content: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        if tensor.untyped_storage().data_ptr() in storages:  # safetensors refuses memory that is shared
            tensor = tensor.clone()
        storages.add(tensor.untyped_storage().data_ptr())
        content[name] = tensor
    with atomic_write(path) as temporary:
        save_file(content, temporary, dict(metadata or {}))


def weight_fault(tensor: object, dtype: torch.dtype = torch.float32) -> str | None:
    """Why ``tensor`` cannot be a weight that is stored as ``dtype``, to follow its name in a message; else None."""
    if not isinstance(tensor, Tensor):
        return f"must be a tensor, got {type(tensor).__name__}"
    if tensor.is_nested or tensor.is_quantized or tensor.layout != torch.strided:
        return f"must be dense, got {'nested' if tensor.is_nested else tensor.layout}"
    if not tensor.is_floating_point():
        return f"must be floating point, got {tensor.dtype}"
    if tensor.is_meta:
        return "has no data (it is on the meta device)"
    if not tensor.numel():
        return None
    values = tensor.detach() if tensor.itemsize > 1 else tensor.detach().float()  # 8 bits have no comparisons
    low, high = (float(x) for x in torch.aminmax(values))
    if not (math.isfinite(low) and math.isfinite(high)):
        return "has NaN or Inf"
    if max(-low, high) > torch.finfo(dtype).max:
        return f"has {max(-low, high):g}, too large for {dtype}"
    return None


def check_weights(tensors: Mapping[str, object], source: str) -> None:
    """Raise CheckpointError that names the first of ``tensors`` that cannot be a weight."""
    for name, tensor in tensors.items():
        fault = weight_fault(tensor)
        if fault is not None:
            raise CheckpointError(f"{source}: {name} {fault}")
