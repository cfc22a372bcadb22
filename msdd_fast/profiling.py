"""Named ranges for profilers. They cost next to nothing unless they are recorded.

``with recording():`` records them with ``torch.profiler.record_function``; MSDD_FAST_NVTX=1 with NVTX too, for Nsight
(read when ``msdd_fast`` is imported). Ranges nest: "scale 32", "layer 3", "norm_modulate [cpu]".
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

T = TypeVar("T")

_nvtx = os.environ.get("MSDD_FAST_NVTX") == "1" and torch.version.cuda is not None
_enabled = _nvtx
_open: list[str] = []


@contextmanager
def recording() -> Iterator[None]:
    """Record ranges inside the block. Process-wide, for one thread at a time."""
    global _enabled
    before, _enabled = _enabled, True
    try:
        yield
    finally:
        _enabled = before


def enabled() -> bool:
    """Whether ranges are recorded."""
    return _enabled


@contextmanager
def range(name: str) -> Iterator[None]:
    """Record one range. Enter it only if ``enabled()``: it does not ask again."""
    _open.append(name)
    try:
        if _nvtx:
            torch.cuda.nvtx.range_push(name)
        with torch.profiler.record_function(name):
            yield
    finally:
        if _nvtx:
            torch.cuda.nvtx.range_pop()
        _open.pop()


def ranges(items: Iterable[T], name: Callable[[int], str]) -> Iterator[T]:
    """Yield the items; the consumer's work on the i-th is recorded in the range ``name(i)``."""
    if not _enabled:
        yield from items
        return
    for i, item in enumerate(items):
        with range(name(i)):
            yield item


def current() -> tuple[str, ...]:
    """The open ranges, outermost first."""
    return tuple(_open)
