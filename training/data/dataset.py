"""Training images: folders and tar shards, random access, reproducible order.

A sample is named by its *global sample index* g: epoch g // N, place g % N in that epoch's permutation.
Crop and flip derive from (seed, g), so the data stream does not depend on workers, processes, batch size or restarts.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import random
import re
import shutil
import subprocess
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from msdd_fast.errors import InputError
from msdd_fast.io.images import IMAGE_SUFFIXES, center_crop, find_image_files, load_image, to_tensor
from msdd_fast.training.loop.draws import hash_seed

RETRIES = 100
FILTERS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
}


class ImageRef(NamedTuple):
    """Where the bytes of one encoded image are: a slice of ``path`` (the whole file if ``size`` is None)."""

    path: Path
    offset: int = 0
    size: int | None = None

    def read(self) -> bytes:
        with open(self.path, "rb") as f:
            f.seek(self.offset)
            return f.read() if self.size is None else f.read(self.size)

    def __str__(self) -> str:
        return str(self.path) if self.size is None else f"{self.path} at byte {self.offset}"


def find_images(sources: Sequence[str | Path], cache: str | Path | None = None) -> list[ImageRef]:
    """Every image in the given folders (recursive) and .tar shards, in a fixed order.

    A source may name many shards, ``train-{000..146}.tar``, and be a command that writes one to its standard output,
    ``pipe:curl -sf https://host/train-{000..146}.tar``; each is run once and its shard kept in the folder ``cache``.

    Raises InputError if a source does not exist, cannot be read, or holds no image.
    """
    refs: list[ImageRef] = []
    for source in (s for given in sources for s in expand_braces(str(given))):
        if source.startswith("pipe:"):
            refs += _tar_images(fetch(source.removeprefix("pipe:"), cache), source)
        elif Path(source).is_dir():
            refs += [ImageRef(p) for p in find_image_files(source)]
        elif source.endswith(".tar") and Path(source).is_file():
            refs += _tar_images(Path(source), source)
        else:
            raise InputError(f"data must be folders or .tar shards, got {source}")
    if not refs:
        raise InputError("data must name at least one folder or .tar shard, got none")
    return refs


def expand_braces(source: str) -> list[str]:
    """``a{08..10}b`` to ["a08b", "a09b", "a10b"]; several ranges multiply."""
    found = re.search(r"\{(\d+)\.\.(\d+)\}", source)
    if found is None:
        return [source]
    first, last = found.groups()
    numbers = range(int(first), int(last) + 1)
    if not numbers:
        raise InputError(f"data must name shards in rising order, got {found[0]} in {source}")
    width = len(first) if first.startswith("0") else 0
    head, tail = source[: found.start()], source[found.end() :]
    return [f"{head}{i:0{width}d}{rest}" for i in numbers for rest in expand_braces(tail)]


def fetch(command: str, cache: str | Path | None) -> Path:
    """The shard that ``command`` writes to its standard output, in ``cache``; run only if it is not there yet.

    Processes of one machine take turns. Raises InputError if the command fails, with what it said.
    """
    if cache is None:
        raise InputError(f"data from a pipe needs cache, a folder for its shards, got none for pipe:{command}")
    target = Path(cache) / f"{hashlib.sha256(command.encode()).hexdigest()[:24]}.tar"
    temporary = target.with_suffix(f".{os.getpid()}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(target.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if target.exists():
                return target
            with open(temporary, "wb") as f:
                shell = ["bash", "-o", "pipefail", "-c"] if shutil.which("bash") else ["sh", "-c"]
                done = subprocess.run([*shell, command], stdout=f, stderr=subprocess.PIPE, text=True, errors="replace")
                f.flush()
                os.fsync(f.fileno())
            if done.returncode:
                said = done.stderr.strip().splitlines()
                raise InputError(
                    f"data shard pipe:{command} is unreachable: exit status {done.returncode}"
                    f"{': ' + said[-1] if said else ''}"
                )
            os.replace(temporary, target)
    except OSError as e:
        raise InputError(f"cannot keep the shard of pipe:{command} in {cache}: {e.strerror or e}") from e
    finally:
        temporary.unlink(missing_ok=True)
    return target


def _tar_images(path: Path, name: str) -> list[ImageRef]:
    try:
        with tarfile.open(path, "r:") as tar:
            refs = [
                ImageRef(path, m.offset_data, m.size)
                for m in tar
                if m.isfile() and Path(m.name).suffix.lower() in IMAGE_SUFFIXES
            ]
    except (tarfile.TarError, OSError) as e:
        raise InputError(f"data shard {name} is not a readable, uncompressed tar file: {e}") from e
    if not refs:
        raise InputError(f"data shard {name} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return refs


@dataclass(frozen=True)
class CropConfig:
    """From a picture to a training image."""

    crop: Literal["random", "adm", "center"] = "random"
    """"random": a square of ``min_crop`` to 1 times the shorter side at a continuous place, resized at once. "adm" (the
    authors' random_crop_arr): halve by box means while twice too large, resize the shorter side to 1 to 1/``min_crop``
    times the target, cut out whole pixels. "center": the largest centred square (the convention of the evaluations)."""
    min_crop: float = 0.8
    resize: Literal["bicubic", "bilinear", "lanczos", "box"] = "bicubic"
    """Filter of "random" and "adm", always antialiased."""
    flip: bool = True
    """Mirror with probability 1/2."""

    def __post_init__(self) -> None:
        if not 0.0 < self.min_crop <= 1.0:
            raise InputError(f"min_crop must be in (0, 1], got {self.min_crop}")


def crop_image(image: Image.Image, size: int, config: CropConfig, rng: random.Random) -> Image.Image:
    """A training image, ``size`` squared, of an RGB picture."""
    resample = FILTERS[config.resize]
    if config.crop == "random":
        side = min(image.size) * rng.uniform(config.min_crop, 1.0)
        left, top = rng.uniform(0, image.width - side), rng.uniform(0, image.height - side)
        image = image.resize((size, size), resample, box=(left, top, left + side, top + side))
    elif config.crop == "center":
        image = center_crop(image, size)
    else:
        shorter = rng.randint(size, max(size, int(size / config.min_crop)))
        while min(image.size) >= 2 * shorter:
            image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
        scale = shorter / min(image.size)
        image = image.resize(tuple(max(size, round(x * scale)) for x in image.size), resample)
        left, top = rng.randint(0, image.width - size), rng.randint(0, image.height - size)
        image = image.crop((left, top, left + size, top + size))
    if config.flip and rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return image


class Sample(NamedTuple):
    """A training image and the pictures that could not be read before one could: (name, reason) each."""

    image: Tensor
    index: int
    unreadable: list[tuple[str, str]]


class ImageDataset(Dataset[Sample]):
    """Augmented training images by global sample index: float32 (3, size, size) in [-1, 1].

    Where a picture cannot be read, the next one in the epoch's order takes its place: the same in every run.

    Args:
        refs: the pictures.
        size: pixels per side.
        seed: of order, crops and flips.
        crop: how a training image is made of a picture.
    """

    def __init__(self, refs: Sequence[ImageRef], size: int, seed: int, crop: CropConfig | None = None) -> None:
        self.crop = CropConfig() if crop is None else crop
        self.refs = list(refs)
        self.size, self.seed = size, seed
        self._epoch = -1
        self._order = torch.empty(0, dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.refs)

    def index_of(self, sample: int) -> int:
        """Which image is global sample ``sample``."""
        epoch, place = divmod(sample, len(self.refs))
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(hash_seed(self.seed, epoch))
            self._order = torch.randperm(len(self.refs), generator=generator)
            self._epoch = epoch
        return int(self._order[place])

    def __getitem__(self, sample: int) -> Tensor:
        return self.sample(sample).image

    def __getitems__(self, samples: list[int]) -> list[Sample]:
        """What a DataLoader asks for: all samples of a micro-batch."""
        return [self.sample(g) for g in samples]

    def sample(self, sample: int) -> Sample:
        """The image of global sample ``sample``. Raises InputError where a hundred in a row cannot be read."""
        start = sample - sample % len(self.refs)
        unreadable: list[tuple[str, str]] = []
        for k in range(min(RETRIES, len(self.refs))):
            ref = self.refs[self.index_of(start + (sample + k) % len(self.refs))]
            try:
                image = load_image(str(ref), ref.read())
            except (InputError, OSError) as e:
                unreadable.append((str(ref), str(e)))
                continue
            image = crop_image(image, self.size, self.crop, random.Random(hash_seed(self.seed, sample)))
            return Sample(to_tensor(image), sample, unreadable)
        raise InputError(f"{len(unreadable)} images in a row cannot be read, the last: {unreadable[-1][1]}")


class Batch(NamedTuple):
    """A micro-batch: images (B, 3, R, R), their global sample indices int64 (B,), and the unreadable pictures."""

    images: Tensor
    samples: Tensor
    unreadable: list[tuple[str, str]]


def collate(samples: list[Sample]) -> Batch:
    return Batch(
        torch.stack([s.image for s in samples]),
        torch.tensor([s.index for s in samples]),
        [bad for s in samples for bad in s.unreadable],
    )


class MicroBatches(Sampler[list[int]]):
    """Global sample indices of one process's micro-batches for the steps ``first`` to ``last`` (exclusive).

    Step s has the samples [s * batch, (s + 1) * batch): process r of n the r-th of n equal parts, in order.
    """

    def __init__(self, first: int, last: int, batch: int, micro: int, rank: int = 0, world: int = 1) -> None:
        self.first, self.last, self.batch, self.micro = first, last, batch, micro
        self.rank, self.share = rank, batch // world

    def __len__(self) -> int:
        return (self.last - self.first) * (self.share // self.micro)

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.first, self.last):
            start = step * self.batch + self.rank * self.share
            for i in range(start, start + self.share, self.micro):
                yield list(range(i, i + self.micro))
