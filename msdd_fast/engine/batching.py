"""Split a batch into the sizes that have a captured graph, or evenly."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import NamedTuple


class Chunk(NamedTuple):
    """``images`` that run as a batch of ``size`` >= ``images``; the rest is padding."""

    size: int
    images: int


def split_by_cost(count: int, cost: Mapping[int, float]) -> list[Chunk]:
    """The cheapest way to run ``count`` images in batches of the sizes in ``cost``, which maps them to seconds.

    Largest first, so that only the last chunk is padded.
    """
    best: list[tuple[float, int]] = [(0.0, 0)]  # seconds and first size for 0, 1, ... images
    for n in range(1, count + 1):
        best.append(min((best[max(0, n - size)][0] + c, size) for size, c in cost.items()))
    sizes = []
    while count > 0:
        size = best[count][1]
        sizes.append(size)
        count -= size
    chunks = []
    left = sum(sizes) + count  # count is now minus the padding
    for size in sorted(sizes, reverse=True):
        chunks.append(Chunk(size, min(size, left)))
        left -= chunks[-1].images
    return chunks


def split_evenly(count: int, largest: int) -> list[Chunk]:
    """Without graphs any size will do: as few chunks of at most ``largest`` as possible, as even as possible."""
    parts = -(-count // largest)
    bounds = [count * i // parts for i in range(parts + 1)] if parts else []
    return [Chunk(b - a, b - a) for a, b in itertools.pairwise(bounds)]


def assumed_cost(sizes: tuple[int, ...]) -> dict[int, float]:
    """Before anything is measured: a batch costs its images plus the latency of about four more."""
    return {size: size + 4.0 for size in sizes}
