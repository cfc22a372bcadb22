"""A measurement in parts that lie in a folder: it can be interrupted, and several processes can share it.

A part is a few batches of the list of images; which ones depends on the list and the batch size alone. So are the
figures: they do not depend on how many processes there were, or how often they were started.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm

from msdd_fast.commands.common import chunks
from msdd_fast.commands.evaluation.sources import Source
from msdd_fast.commands.evaluation.suite import Suite
from msdd_fast.commands.record import EVAL_RECORD, prepare_folder
from msdd_fast.errors import InputError
from msdd_fast.io.safetensors import open_safetensors, write_safetensors
from msdd_fast.metrics.distances import frechet_distance, kernel_distance
from msdd_fast.metrics.statistics import FeatureStatistics

RECORD = EVAL_RECORD
ON_RAY = -1
_PART_IMAGES = 256
_PARTS = 64


class Part(NamedTuple):
    """What was measured of consecutive images.

    Attributes:
        numbers: of the images that could be read.
        tensors: as ``Suite.measure`` returns them.
        unreadable: number and reason of the others.
        seconds, rank: time as the authors count it, and the process that spent it (ON_RAY for a worker on Ray).
    """

    numbers: list[int]
    tensors: dict[str, Tensor]
    unreadable: dict[int, str]
    seconds: float
    rank: int


def part_size(count: int, batch: int) -> int:
    """Images of a part: whole batches, at most 256 images, and about 64 parts if there are that many batches."""
    batches = -(-count // batch)
    return batch * max(1, min(-(-batches // _PARTS), _PART_IMAGES // batch))


class PartFolder:
    """Parts of a measurement of ``count`` images in a folder.

    Args:
        protocol: everything that the figures depend on, for ``prepare``.
    """

    def __init__(self, folder: Path, count: int, batch: int, protocol: Mapping[str, Any]) -> None:
        self.folder, self.batch, self.protocol = folder, batch, dict(protocol)
        self.parts = list(chunks(count, part_size(count, batch)))

    def path(self, number: int) -> Path:
        return self.folder / f"{number:06d}.safetensors"

    def prepare(self, overwrite: bool) -> None:
        """Leave the protocol in the folder. Raises InputError if parts of another one are there.

        With ``overwrite``, all parts that are there are removed.
        """
        prepare_folder(self.folder, RECORD, self.protocol, overwrite, files="parts", content="figures")

    def missing(self) -> list[int]:
        """Numbers of the parts that are not there, or do not load."""
        return [number for number in range(len(self.parts)) if not self._is_there(number)]

    def _is_there(self, number: int) -> bool:
        try:
            with open_safetensors(self.path(number)) as f:
                return "rank" in (f.metadata() or {})
        except (OSError, SafetensorError):
            return False

    def read(self, number: int) -> Part | None:
        """None if there is none, or it does not load."""
        try:
            with open_safetensors(self.path(number)) as f:
                about = f.metadata() or {}
                tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118 (not a dict)
            index = tensors.pop("index").tolist()
            unreadable = {int(i): str(reason) for i, reason in json.loads(about["unreadable"]).items()}
            return Part(index, tensors, unreadable, float(about["seconds"]), int(about["rank"]))
        except (OSError, ValueError, KeyError, SafetensorError):
            return None

    def __iter__(self) -> Iterator[Part]:
        """All parts in order. Raises InputError if one is not there."""
        for number in range(len(self.parts)):
            part = self.read(number)
            if part is None:
                raise InputError(f"{self.path(number)} is missing or damaged: run the command again")
            yield part


def write_part(path: str | os.PathLike[str], part: Part) -> None:
    metadata = {
        "unreadable": json.dumps({str(i): reason for i, reason in part.unreadable.items()}),
        "seconds": repr(part.seconds),
        "rank": str(part.rank),
    }
    tensors = {"index": torch.tensor(part.numbers, dtype=torch.int64), **part.tensors}
    write_safetensors(tensors, path, metadata)


def measure_part(
    source: Source, suite: Suite, images: range, batch: int, rank: int, shown: tqdm[Any] | None = None
) -> Part:
    """Measure the images of one part, a batch at a time."""
    numbers: list[int] = []
    tensors: dict[str, list[Tensor]] = {}
    seconds = 0.0
    for chunk in chunks(len(images), batch):
        pairs = source.read(images[chunk.start : chunk.stop])
        numbers += pairs.numbers
        seconds += pairs.seconds
        for name, value in suite.measure(pairs.results, pairs.references).items():
            tensors.setdefault(name, []).append(value)
        if shown is not None:
            shown.update(len(chunk))
    unreadable = {i: reason for i, reason in source.unreadable.items() if i in images}
    return Part(numbers, {name: torch.cat(values) for name, values in tensors.items()}, unreadable, seconds, rank)


class Result(NamedTuple):
    """Figures of a set.

    Attributes:
        mean: of the figures of pairs, then the figures of the whole set.
        images: the figures of every pair, by its number.
        unreadable: by number.
        seconds, timed: process 0's time as the authors count it, and its images.
        details: what belongs to a figure of the whole set: how many features, KID's deviation and subsets.
    """

    mean: dict[str, float]
    images: dict[int, dict[str, float]]
    unreadable: dict[int, str]
    seconds: float
    timed: int
    details: dict[str, dict[str, Any]]


def collect(folder: PartFolder, suite: Suite) -> Result:
    """Read all parts. Raises InputError if one is not there, or no image could be read."""
    images: dict[int, dict[str, float]] = {}
    unreadable: dict[int, str] = {}
    seconds, timed = 0.0, 0
    sides = ("reference", "result")
    statistics = {(n.network, s): FeatureStatistics(n.width) for n in suite.networks for s in sides}
    features: dict[tuple[str, str], list[Tensor]] = {key: [] for key in statistics}
    for part in folder:
        unreadable |= part.unreadable
        if part.rank == 0:
            seconds, timed = seconds + part.seconds, timed + len(part.numbers)
        if not part.numbers:
            continue
        values = {name: part.tensors[name].tolist() for name in suite.pairs}
        images |= {i: {name: v[k] for name, v in values.items()} for k, i in enumerate(part.numbers)}
        for key, whole in statistics.items():
            seen = part.tensors[f"features.{key[0]}.{key[1]}"]
            mine = FeatureStatistics(seen.shape[1])
            mine.update(seen)
            whole.merge(mine)
            features[key].append(seen)
    if not images:
        count, first = len(unreadable), next(iter(unreadable.values()))
        raise InputError(first if count == 1 else f"none of {count} images can be read, the first: {first}")
    mean = {name: sum(v[name] for v in images.values()) / len(images) for name in suite.pairs}
    details: dict[str, dict[str, Any]] = {}
    for network in suite.networks:
        before, after = (statistics[network.network, s] for s in sides)
        mean[network.frechet] = frechet_distance(before, after)
        kernel = kernel_distance(*(torch.cat(features[network.network, s]) for s in sides))
        mean[network.kid] = kernel.mean
        details[network.frechet] = {"features": network.width, "images": before.count}
        details[network.kid] = {"std": kernel.std, "subsets": kernel.subsets, "subset_size": kernel.subset_size}
    return Result(mean, images, unreadable, seconds, timed, details)
