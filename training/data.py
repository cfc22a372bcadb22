"""Training images: folders and tar shards, random access, reproducible order.

A sample is named by its *global sample index* g: epoch g // N, place g % N in that epoch's permutation.
Crop and flip derive from (seed, g), so the data stream does not depend on workers, batch size or restarts.
"""

from __future__ import annotations

import io
import random
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from msdd_fast.errors import InputError
from msdd_fast.images import IMAGE_SUFFIXES, find_image_files, to_tensor


class ImageRef(NamedTuple):
    """Where the bytes of one encoded image are: a slice of ``path`` (the whole file if ``size`` is None)."""

    path: Path
    offset: int = 0
    size: int | None = None

    def read(self) -> bytes:
        with open(self.path, "rb") as f:
            f.seek(self.offset)
            return f.read() if self.size is None else f.read(self.size)


def find_images(sources: Sequence[str | Path]) -> list[ImageRef]:
    """Every image in the given folders (recursive) and .tar shards, in a fixed order.

    Raises InputError if a source does not exist, cannot be read, or holds no image.
    """
    refs: list[ImageRef] = []
    for source in map(Path, sources):
        if source.is_dir():
            refs += [ImageRef(p) for p in find_image_files(source)]
        elif source.suffix == ".tar" and source.is_file():
            refs += _tar_images(source)
        else:
            raise InputError(f"data must be folders or .tar shards, got {source}")
    return refs


def _tar_images(path: Path) -> list[ImageRef]:
    try:
        with tarfile.open(path, "r:") as tar:
            refs = [
                ImageRef(path, m.offset_data, m.size)
                for m in tar
                if m.isfile() and Path(m.name).suffix.lower() in IMAGE_SUFFIXES
            ]
    except (tarfile.TarError, OSError) as e:
        raise InputError(f"data shard {path} is not a readable, uncompressed tar file: {e}") from e
    if not refs:
        raise InputError(f"data shard {path} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return refs


class ImageDataset(Dataset[Tensor]):
    """Augmented training images by global sample index: float32 (3, size, size) in [-1, 1].

    Random square crop with a side of ``min_crop`` to 1 times the shorter side, antialiased bicubic resize
    to ``size``, horizontal flip with probability 1/2 (SPEC A5).
    """

    def __init__(
        self, refs: Sequence[ImageRef], size: int, seed: int, min_crop: float = 0.8, flip: bool = True
    ) -> None:
        if not 0.0 < min_crop <= 1.0:
            raise InputError(f"min_crop must be in (0, 1], got {min_crop}")
        self.refs = list(refs)
        self.size, self.seed, self.min_crop, self.flip = size, seed, min_crop, flip
        self._epoch = -1
        self._order: list[int] = []

    def __len__(self) -> int:
        return len(self.refs)

    def index_of(self, sample: int) -> int:
        """Which image is global sample ``sample``."""
        epoch, place = divmod(sample, len(self.refs))
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(hash_seed(self.seed, epoch))
            self._order = torch.randperm(len(self.refs), generator=generator).tolist()
            self._epoch = epoch
        return self._order[place]

    def __getitem__(self, sample: int) -> Tensor:
        ref = self.refs[self.index_of(sample)]
        try:
            image = Image.open(io.BytesIO(ref.read())).convert("RGB")
        except (UnidentifiedImageError, OSError) as e:
            raise InputError(f"{ref.path} at byte {ref.offset}: not a readable image: {e}") from e
        rng = random.Random(hash_seed(self.seed, sample))
        short = min(image.size)
        side = short * rng.uniform(self.min_crop, 1.0)
        left, top = rng.uniform(0, image.width - side), rng.uniform(0, image.height - side)
        box = (left, top, left + side, top + side)
        image = image.resize((self.size, self.size), Image.Resampling.BICUBIC, box=box)
        if self.flip and rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return to_tensor(image)


class ResumableSampler(Sampler[int]):
    """Global sample indices first, first + 1, ... up to ``last`` (exclusive)."""

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last = first, last

    def __len__(self) -> int:
        return self.last - self.first

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.first, self.last))


def hash_seed(*parts: int) -> int:
    """A well-mixed 63-bit seed from integers, the same on every machine and run."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))
