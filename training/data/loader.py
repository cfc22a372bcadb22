"""Batches of training images."""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from msdd_fast.errors import InputError
from msdd_fast.training.data.dataset import ImageDataset, Sample
from msdd_fast.training.loop.distributed import rank, world_size
from msdd_fast.training.loop.signals import ignore_stop_signals


class Batch(NamedTuple):
    """A micro-batch.

    Attributes:
        images: float32 (B, 3, R, R) in [-1, 1].
        samples: int64 (B,), global sample indices.
        unreadable: images (name, reason) that were skipped.
    """

    images: Tensor
    samples: Tensor
    unreadable: list[tuple[str, str]]


def collate(samples: list[Sample]) -> Batch:
    return Batch(
        torch.stack([s.image for s in samples]),
        torch.tensor([s.sample for s in samples]),
        [bad for s in samples for bad in s.unreadable],
    )


class MicroBatches(Sampler[list[int]]):
    """Global sample indices of one process's micro-batches.

    Step s has the samples [s * batch, (s + 1) * batch), of which rank r of n takes the r-th of n equal parts.

    Args:
        steps: optimiser steps.
        batch: samples per step, over all processes.
        micro: samples per micro-batch.
        rank, world: which process of how many.
    """

    def __init__(self, steps: range, batch: int, micro: int, rank: int = 0, world: int = 1) -> None:
        self.steps, self.batch, self.micro, self.rank = steps, batch, micro, rank
        self.share = batch // world
        self.per_step = self.share // micro

    def __len__(self) -> int:
        return len(self.steps) * self.per_step

    def __iter__(self) -> Iterator[list[int]]:
        for step in self.steps:
            start = step * self.batch + self.rank * self.share
            for i in range(start, start + self.share, self.micro):
                yield list(range(i, i + self.micro))


def step_batches(
    dataset: ImageDataset, steps: range, batch: int, micro: int, workers: int = 0, pin_memory: bool = False
) -> Generator[list[Batch], None, None]:
    """This process's micro-batches of every step; see ``MicroBatches``. Close it to end the workers.

    Raises InputError for data that cannot be read.
    """
    sampler = MicroBatches(steps, batch, micro, rank(), world_size())
    loader: DataLoader[Any] = DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=workers,
        pin_memory=pin_memory,
        worker_init_fn=ignore_stop_signals,
    )
    batches: Any = iter(loader)
    try:
        while step := list(itertools.islice(batches, sampler.per_step)):
            yield step
    except InputError as e:  # a worker's error contains its traceback as text
        raise InputError(str(e).strip().splitlines()[-1].split("InputError: ")[-1]) from None
    finally:  # Python's exit ends workers with SIGTERM, which these ignore: it would wait for ever
        if workers:
            batches._shutdown_workers()
