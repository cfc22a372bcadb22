"""Safetensors files."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from msdd_fast.errors import CheckpointError


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of one safetensors file. Raises CheckpointError if it is missing or damaged."""
    try:
        with safe_open(path, framework="pt") as f:
            return {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118 (not a dict)
    except FileNotFoundError as e:
        raise CheckpointError(f"{path} is missing") from e
    except (SafetensorError, OSError, ValueError) as e:
        raise CheckpointError(f"{path} is damaged or not a safetensors file: {e}") from e
