"""The random numbers of training: each a function of (seed, global sample index), or of (seed, step).

A run therefore depends neither on how a batch is split over processes and micro-batches nor on restarts. The generator
is the Philox of ``msdd_fast/diffusion/noise.py``: key = the run's seed, counter = (sample, purpose, variant).
"""

from __future__ import annotations

import enum

import numpy as np
import torch
from torch import Tensor

from msdd_fast.diffusion.noise import box_muller, philox

_MASK32 = 0xFFFFFFFF


class Purpose(enum.IntEnum):
    """What a random number is for. A new purpose takes a new value, so that existing runs keep their numbers."""

    STAGE = 0
    TIME = 1
    AT_START = 2
    NULL_CONTEXT = 3
    NOISE = 4
    RESTART_LEVEL = 5
    RESTART_START = 6
    RESTART_NOISE = 7
    PERCEPTUAL_CROP = 8
    GENERATOR_CROP = 9
    CRITIC_CROP = 10
    AUGMENT_REAL = 11
    AUGMENT_FAKE = 12
    LATENT_NOISE = 13


class Draws:
    """Random numbers for the samples of one (micro-)batch.

    Args:
        seed: of the run.
        step: optimiser step, for numbers that a whole batch shares.
        samples: int64 (B,) on the CPU, global sample indices.
    """

    def __init__(self, seed: int, step: int, samples: Tensor) -> None:
        self.seed, self.step, self.samples = seed, step, samples
        key = hash_seed(seed)
        self._key = torch.tensor(key & _MASK32), torch.tensor(key >> 32)

    def __len__(self) -> int:
        return len(self.samples)

    def of(self, index: Tensor) -> Draws:
        """The numbers of some samples of the batch, by their places in it."""
        return Draws(self.seed, self.step, self.samples[index])

    def words(self, purpose: Purpose, variant: int = 0, index: Tensor | None = None) -> tuple[Tensor, ...]:
        """Four 32-bit words, each int64 (B,), per sample, or per element of ``index``, int64 (B,)."""
        index = self.samples if index is None else index
        constant = torch.zeros_like(index)
        return philox((index & _MASK32, index >> 32, constant + int(purpose), constant + variant), self._key)

    def seeds(self, purpose: Purpose, variant: int = 0) -> Tensor:
        """int64 (B,) in [0, 2^62): seeds for ``msdd_fast/diffusion/noise.py``."""
        low, high, *_ = self.words(purpose, variant)
        return low | ((high & 0x3FFFFFFF) << 32)

    def uniform(self, purpose: Purpose, count: int = 1, variant: int = 0) -> Tensor:
        """float32 (count, B), uniform in [0, 1)."""
        words = [w for v in range(-(-count // 4)) for w in self.words(purpose, variant + v)]
        return (torch.stack(words[:count]) >> 8).float() * 2.0**-24

    def normal(self, purpose: Purpose, variant: int = 0) -> Tensor:
        """float32 (B,), standard normal."""
        radius, angle, *_ = self.words(purpose, variant)
        return box_muller(radius, angle)[0]

    def order(self, purpose: Purpose, items: int) -> Tensor:
        """int64 (B,): sample g gets element g % items of the permutation of its block of ``items`` samples.

        Any ``items`` consecutive samples that start at a multiple of ``items`` get each element exactly once.
        """
        block = self.samples // items
        keys = [w for v in range(-(-items // 4)) for w in self.words(purpose, v, block)]
        permutation = torch.stack(keys[:items], dim=1).argsort(dim=1, stable=True)
        return permutation.gather(1, (self.samples % items)[:, None])[:, 0]

    def shared(self, purpose: Purpose) -> torch.Generator:
        """A CPU generator that all samples of the step share; every call restarts it."""
        return torch.Generator().manual_seed(hash_seed(self.seed, self.step, int(purpose)))


def hash_seed(*parts: int) -> int:
    """A well-mixed 63-bit seed from integers, the same on every machine and run."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))
