"""Differentiable augmentation for the discriminator (Zhao et al., 2020): colour, translation, cutout."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

NUM_DRAWS = 7


def augment(images: Tensor, uniform: Tensor) -> Tensor:
    """Colour, translation by up to 1/8 of the side and a cutout of half the side, drawn per image.

    (B, 3, H, W) to the same shape; differentiable. ``uniform``: (NUM_DRAWS, B) in [0, 1).
    """
    height, width = images.shape[-2:]
    draws = uniform[:, :, None, None, None].to(images.device)
    x = images + (draws[0] - 0.5)
    grey = x.mean(dim=1, keepdim=True)
    x = grey + (x - grey) * (2 * draws[1])
    mean = x.mean(dim=(1, 2, 3), keepdim=True)
    x = mean + (x - mean) * (0.5 + draws[2])
    rows = torch.arange(height, device=x.device).view(1, 1, -1, 1)
    cols = torch.arange(width, device=x.device).view(1, 1, 1, -1)
    x = _shift(x, _steps(draws[3], height // 8), _steps(draws[4], width // 8))
    top, left = (draws[5] * (height + 1)).floor(), (draws[6] * (width + 1)).floor()
    inside = ((rows - top).abs() <= height // 4) & ((cols - left).abs() <= width // 4)
    return x * ~inside


def _steps(draw: Tensor, most: int) -> Tensor:
    """A uniform draw in [0, 1) to an integer in [-most, most]."""
    return (draw * (2 * most + 1)).floor().long() - most


def _shift(x: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """Translate every image by its own number of pixels, filling with zeros."""
    batch, channels, height, width = x.shape
    padded = F.pad(x, (1, 1, 1, 1))
    rows = (torch.arange(height, device=x.device).view(1, 1, -1, 1) - down + 1).clamp(0, height + 1)
    cols = (torch.arange(width, device=x.device).view(1, 1, 1, -1) - right + 1).clamp(0, width + 1)
    index = torch.arange(batch, device=x.device).view(-1, 1, 1, 1)
    channel = torch.arange(channels, device=x.device).view(1, -1, 1, 1)
    return padded[index, channel, rows, cols]
