"""Sinusoidal features of a time (docs/spec.md#adaln, docs/spec.md#ssdd-network)."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def sinusoids(t: Tensor, count: int) -> Tensor:
    """cos then sin of t (B,) times exp(-ln(10000) i / (count/2)), i < count/2: float32 (B, count), count even."""
    half = count // 2
    index = torch.arange(half, device=t.device, dtype=torch.float32)
    angle = t.float()[:, None] * torch.exp(-math.log(10000.0) / half * index)
    return torch.cat([angle.cos(), angle.sin()], dim=1)
