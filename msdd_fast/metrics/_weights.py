"""Weights of networks that judge images, from local files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import Tensor

from msdd_fast.errors import CheckpointError
from msdd_fast.io.safetensors import read_safetensors
from msdd_fast.io.torch_files import read_torch_file


def read_weights(path: str | os.PathLike[str], what: str, source: str) -> Any:
    """Content of ``path``, a PyTorch or safetensors file.

    Raises CheckpointError, which names ``source`` if there is no such file.
    """
    if not Path(path).is_file():
        raise CheckpointError(f"{what} not found: expected {source}, got {path}")
    return read_safetensors(Path(path)) if Path(path).suffix == ".safetensors" else read_torch_file(path)


def copy_weight(parameter: Tensor, state: Any, name: str, path: str | os.PathLike[str], network: str) -> None:
    """Copy the tensor ``name`` of the state dict ``state`` into ``parameter``.

    Raises CheckpointError, which says that ``path`` is not ``network``, if it is missing or has another shape.
    """
    tensor = state.get(name) if isinstance(state, dict) else None
    if not isinstance(tensor, Tensor) or tensor.shape != parameter.shape:
        got = tuple(tensor.shape) if isinstance(tensor, Tensor) else "nothing of the kind"
        raise CheckpointError(f"{path} is not {network}: expected {name} of shape {tuple(parameter.shape)}, got {got}")
    parameter.data.copy_(tensor)
