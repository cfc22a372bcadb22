"""Numbers for the examples of ops (``Op.example``)."""

from __future__ import annotations

import torch
from torch import Tensor


def normals(*shapes: tuple[int, ...]) -> list[Tensor]:
    """A float32 tensor of normals for each shape, on the CPU; the same numbers at every call."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, device="cpu") for shape in shapes]
