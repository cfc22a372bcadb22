"""Metrics on held-out images during training."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from msdd_fast.errors import InputError
from msdd_fast.io.images import load_batch, load_image
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

    Raises InputError, which names the first, if any of this process's files is not a readable image: before the first
    step, and not hours later.
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
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            bad = [error for error in pool.map(_error, [file for _, file in self._mine()]) if error]
        if bad:
            raise InputError(f"val has {len(bad)} unreadable image{'s' if len(bad) > 1 else ''}: {bad[0]}")

    def _mine(self) -> list[tuple[int, Path]]:
        return list(enumerate(self.files))[rank() :: world_size()]

    @torch.no_grad()
    def measure(self, tokenizer: Tokenizer) -> dict[str, float]:
        """Means over all images, equal in all processes: psnr_db and, with a distance, vgg19_distance.

        Raises InputError in all processes if an image can no longer be read in one.
        """
        sums = torch.zeros(4, dtype=torch.float64)
        mine = self._mine()
        error: InputError | None = None
        for i in range(0, len(mine), self.batch):
            part = mine[i : i + self.batch]
            try:
                x = load_batch([file for _, file in part], self.size).to(self.device)
            except InputError as e:
                error, sums[3] = e, 1.0
                break
            y = tokenizer.decode(tokenizer.encode(x), seed=[seed for seed, _ in part])
            distance = self.distance(y.clamp(-1, 1), x) if self.distance else torch.zeros(1)
            sums[:3] += torch.tensor([len(part), float(psnr(y, x).double().sum()), float(distance.double().sum())])
        count, *totals, failed = sum_over_processes(sums).tolist()
        if failed:
            raise error or InputError("an image of val can no longer be read by another process")
        names = ("psnr_db", "vgg19_distance") if self.distance else ("psnr_db",)
        return {name: total / count for name, total in zip(names, totals, strict=False)}


def _error(file: Path) -> str | None:
    """Why the file is not a readable image, or None."""
    try:
        load_image(file)
    except InputError as e:
        return str(e)
    return None
