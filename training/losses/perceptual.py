"""Perceptual distances by name. Weights come from local files; nothing is downloaded."""

from __future__ import annotations

import logging
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msdd_fast.errors import ConfigError
from msdd_fast.metrics.lpips import LpipsVgg
from msdd_fast.metrics.vgg19 import Vgg19Distance

log = logging.getLogger(__name__)

PerceptualName = Literal["vgg19", "lpips-vgg", "random"]


class Perceptual(nn.Module):
    """A distance and the name of its metric in the log.

    Args:
        name: says which network is used: "vgg19_distance", "lpips_vgg", "random_distance".
        distance: two batches of images (B, 3, H, W) in [-1, 1] to (B,); differentiable, with frozen parameters.
    """

    def __init__(self, name: str, distance: nn.Module) -> None:
        super().__init__()
        self.name, self.distance = name, distance

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):  # bfloat16 would round a small distance to nonsense
            out: Tensor = self.distance(x.float(), y.float())
        return out


class RandomDistance(nn.Module):
    """Squared difference of untrained convolutional features, for tests only."""

    weight1: Tensor
    weight2: Tensor

    def __init__(self, width: int = 8, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer("weight1", torch.randn(width, 3, 3, 3, generator=generator) / 27**0.5)
        self.register_buffer("weight2", torch.randn(width, width, 3, 3, generator=generator) / (9 * width) ** 0.5)

    def features(self, x: Tensor) -> Tensor:
        x = F.relu(F.conv2d(x.float(), self.weight1, padding=1))
        return F.conv2d(F.avg_pool2d(x, 2), self.weight2, padding=1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return (self.features(x) - self.features(y)).square().mean(dim=(1, 2, 3))


def make_perceptual(
    name: PerceptualName, vgg19: str | None = None, vgg16: str | None = None, lpips_heads: str | None = None
) -> Perceptual:
    """The distance called ``name``, from the files that it needs.

    Raises ConfigError if a file is not given, CheckpointError if it is missing or contains another network.
    """
    if name == "vgg19":
        return Perceptual("vgg19_distance", Vgg19Distance(_named(name, "vgg19", vgg19, Vgg19Distance.SOURCE)))
    if name == "lpips-vgg":
        weights = _named(name, "vgg16", vgg16, LpipsVgg.SOURCE)
        return Perceptual("lpips_vgg", LpipsVgg(weights, _named(name, "lpips_heads", lpips_heads, LpipsVgg.HEADS)))
    log.warning("perceptual 'random' is an untrained network, for tests only: it does not measure perception")
    return Perceptual("random_distance", RandomDistance())


def _named(name: str, option: str, file: str | None, source: str) -> str:
    if file is None:
        raise ConfigError(f"perceptual {name!r} needs the file {option}, got none: {source}")
    return file


def require_perceptual(weight: float, perceptual: object) -> None:
    """Raises ConfigError if the perceptual distance has a weight but is missing."""
    if weight > 0 and perceptual is None:
        raise ConfigError(
            f"perceptual_weight > 0 needs a perceptual distance: make_perceptual('vgg19', vgg19=FILE) with "
            f"{Vgg19Distance.SOURCE}, or make_perceptual('lpips-vgg', vgg16=FILE, lpips_heads=FILE) with "
            f"{LpipsVgg.SOURCE} and {LpipsVgg.HEADS}"
        )
