"""The record of a run that can be continued: what its results depend on, in a JSON file beside them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from msdd_fast.io.files import read_json


def digest(text: str, tensors: Mapping[str, Tensor] | None = None) -> str:
    """Of a text, and of the names, dtypes, shapes and bits of tensors: 16 hexadecimal digits."""
    found = hashlib.sha256(text.encode())
    for name, tensor in sorted((tensors or {}).items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()[:16]


def read_record(path: Path) -> dict[str, Any] | None:
    """None if there is none that can be read."""
    try:
        record = read_json(path)
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None
