"""Metrics on held-out images during training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from msdd_fast.io.images import load_batch
from msdd_fast.metrics.image import psnr
from msdd_fast.metrics.vgg19 import Vgg19Distance
from msdd_fast.tokenizer import Tokenizer
from msdd_fast.training.loop.distributed import rank, sum_over_processes, world_size


class Validation:
    """Reconstructs the largest centred square of held-out images; image i is decoded with seed i.

    Args:
        files: images; rank r of n takes every n-th, starting at r.
        size: pixels per side.
        device: of the tokenizer.
        distance: optional perceptual distance.
        batch: images at a time.
    """

    def __init__(
        self,
        files: Sequence[Path],
        size: int,
        device: str,
        distance: Vgg19Distance | None = None,
        batch: int = 16,
    ) -> None:
        self.files, self.size, self.device, self.distance, self.batch = list(files), size, device, distance, batch

    @torch.no_grad()
    def measure(self, tokenizer: Tokenizer) -> dict[str, float]:
        """Means over all images, equal in all processes: psnr_db and, with a distance, vgg19_distance."""
        sums = torch.zeros(3, dtype=torch.float64)
        mine = list(enumerate(self.files))[rank() :: world_size()]
        for i in range(0, len(mine), self.batch):
            part = mine[i : i + self.batch]
            x = load_batch([file for _, file in part], self.size).to(self.device)
            y = tokenizer.decode(tokenizer.encode(x), seed=[seed for seed, _ in part])
            distance = self.distance(y.clamp(-1, 1), x) if self.distance else torch.zeros(1)
            sums += torch.tensor([len(part), float(psnr(y, x).double().sum()), float(distance.double().sum())])
        count, *totals = sum_over_processes(sums).tolist()
        names = ("psnr_db", "vgg19_distance") if self.distance else ("psnr_db",)
        return {name: total / count for name, total in zip(names, totals, strict=False)}
