"""PiD's rotary angles (docs/spec.md#pid-rope): rows of a caption by their number, patches by their place."""

from __future__ import annotations

import torch
from torch import Tensor

from msdd_fast.diffusion.rope import RopeTable
from msdd_fast.families.pid.config import PiDNetworkConfig

BASE = 10000.0
SPAN = 16.0
"""Positions run from 0 to this over either side of the image, whatever its size."""


def text_rope(rows: int, head_dim: int, device: torch.device) -> RopeTable:
    """cos and sin (rows, head_dim / 2): pair j of row m turns by m * BASE^(-2 j / head_dim)."""
    angle = torch.outer(torch.arange(rows, device=device).float(), _frequencies(BASE, head_dim, 2, device))
    return RopeTable(angle.cos(), angle.sin())


def image_rope(config: PiDNetworkConfig, grid: tuple[int, int], head_dim: int, device: torch.device) -> RopeTable:
    """cos and sin (rows * columns, head_dim / 2) of patches in row-major order; even pairs turn with the column."""
    angles = []
    for size, reference in zip(grid, config.rope_reference, strict=True):
        base = BASE if config.rope == "original" else BASE * ntk_factor(size, reference // config.patch_size, head_dim)
        position = torch.linspace(0, SPAN, size, device=device)
        angles.append(torch.outer(position, _frequencies(base, head_dim, 4, device)))
    rows, columns = grid
    y, x = angles[0].repeat_interleave(columns, dim=0), angles[1].repeat(rows, 1)
    angle = torch.stack([x, y], dim=-1).flatten(1)
    return RopeTable(angle.cos(), angle.sin())


def ntk_factor(size: int, reference: int, head_dim: int) -> float:
    """By how much the base grows with a side of ``size`` patches; below 1 for fewer than the reference."""
    half = head_dim / 2
    return (size / reference) ** (half / (half - 2)) if half > 2 else 1.0


def _frequencies(base: float, head_dim: int, stride: int, device: torch.device) -> Tensor:
    """base^(-i / head_dim) for i = 0, stride, 2 stride, ... below head_dim."""
    exponent = torch.arange(0, head_dim, stride, device=device).float() / head_dim
    return 1.0 / base**exponent
