"""Named ranges for profilers: nothing unless one is looking.

``with watched():`` turns on ``torch.profiler.record_function``; MSDD_FAST_NVTX=1 turns on NVTX for Nsight (read when
``msdd_fast`` is imported). Names nest: "scale 32", "layer 3", "norm_modulate [cpu]".
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

T = TypeVar("T")

_nvtx = os.environ.get("MSDD_FAST_NVTX") == "1" and torch.version.cuda is not None
_on = _nvtx
_stack: list[str] = []


@contextmanager
def watched() -> Iterator[None]:
    """Ranges are recorded inside the block; for the whole process, one thread."""
    global _on
    before, _on = _on, True
    try:
        yield
    finally:
        _on = before


def on() -> bool:
    """Whether ranges are recorded."""
    return _on


@contextmanager
def span(name: str) -> Iterator[None]:
    """One range; call it only where ``on()``."""
    _stack.append(name)
    try:
        if _nvtx:
            torch.cuda.nvtx.range_push(name)
        with torch.profiler.record_function(name):
            yield
    finally:
        if _nvtx:
            torch.cuda.nvtx.range_pop()
        _stack.pop()


def spans(items: Iterable[T], name: Callable[[int], str]) -> Iterator[T]:
    """The items; while the consumer works on the i-th, it is in the range ``name(i)``."""
    if not _on:
        yield from items
        return
    for i, item in enumerate(items):
        with span(name(i)):
            yield item


def current() -> tuple[str, ...]:
    """The open ranges, outermost first."""
    return tuple(_stack)
