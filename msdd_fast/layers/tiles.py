"""Overlapping tiles of an image, and the weights that blend what was computed in them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from msdd_fast.layers.request import WHOLE, Way

OVERLAP = 4
"""Neighbours share at least one part in so many of a tile's side."""
PARTS = (4, 16, 64)
"""Numbers of parts that are tried."""


class Tile(NamedTuple):
    """One tile.

    Attributes:
        rows, columns: its place in units, such as cells of latents.
        high, wide: its place in pixels.
        down, across: weights of its rows and columns of pixels, float32. Their products add up to 1 over all tiles.
    """

    rows: slice
    columns: slice
    high: slice
    wide: slice
    down: Tensor
    across: Tensor


def tiles(grid: tuple[int, int], side: int, unit: int, device: torch.device) -> Iterator[Tile]:
    """Tiles of ``side`` units of ``unit`` pixels that cover a ``grid`` of units, row by row."""
    across = list(_along(grid[1], side, unit, device))
    for rows, down in _along(grid[0], side, unit, device):
        for columns, weights in across:
            yield Tile(rows, columns, _pixels(rows, unit), _pixels(columns, unit), down, weights)


def parts_and_tiles(height: int, width: int, min_rows: int, min_tile: int) -> list[Way]:
    """Ways for an image of this size: whole, in parts of at least ``min_rows`` rows of pixels, in smaller tiles."""
    chunked = [Way(parts=n) for n in PARTS if n * min_rows <= height]
    tiled, side = [], min_tile
    while side < max(height, width):
        tiled.append(Way(tile=side))
        side *= 2
    return [WHOLE, *chunked, *reversed(tiled)]


def largest_tile(grid: tuple[int, int], side: int) -> tuple[int, int]:
    """Rows and columns of the tiles of a grid."""
    return min(grid[0], side), min(grid[1], side)


def spans(length: int, side: int) -> list[slice]:
    """As few parts of ``side`` as cover ``length`` with an overlap of side / OVERLAP, evenly spread."""
    if length <= side:
        return [slice(0, length)]
    step = side - -(-side // OVERLAP)
    count = -(-(length - side) // step) + 1
    begins = [(length - side) * i // (count - 1) for i in range(count)]
    return [slice(begin, begin + side) for begin in begins]


def _along(length: int, side: int, unit: int, device: torch.device) -> list[tuple[slice, Tensor]]:
    """Spans of one axis with the weights of their pixels, which rise and fall evenly where neighbours overlap."""
    found = spans(length, side)
    weights = []
    for i, span in enumerate(found):
        place = torch.arange(unit * (span.stop - span.start), dtype=torch.float32) + 0.5
        weight = torch.ones_like(place)
        if i > 0:
            weight = weight.minimum(place / (unit * (found[i - 1].stop - span.start)))
        if i + 1 < len(found):
            weight = weight.minimum((len(place) - place) / (unit * (span.stop - found[i + 1].start)))
        weights.append(weight)
    total = torch.zeros(unit * length)
    for span, weight in zip(found, weights, strict=True):
        total[_pixels(span, unit)] += weight
    return [
        (span, (weight / total[_pixels(span, unit)]).to(device)) for span, weight in zip(found, weights, strict=True)
    ]


def _pixels(span: slice, unit: int) -> slice:
    return slice(unit * span.start, unit * span.stop)
