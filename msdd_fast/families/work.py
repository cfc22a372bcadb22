"""FLOP and bytes of a decode by formula: the terms in which every family counts its work.

A multiply-add is 2 FLOP. Only matrix products, convolutions and attention count, as in ``torch.utils.flop_counter``.
Bytes are the least that the engine's ops can move: every op reads its inputs and its weights once and writes its result
once.

    work = family_of(config).decode_work(batch=1)
    total(work).flops, total(w for w in work if w.scale == 32).weight_bytes
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class Work(NamedTuple):
    """One op of one layer at one scale.

    ``scale`` is in pixels per side, 0 for work done once per image; ``layer`` is -1 outside the layers.
    """

    op: str
    layer: int
    scale: int
    flops: int
    weight_bytes: int
    activation_bytes: int

    @property
    def bytes(self) -> int:
        return self.weight_bytes + self.activation_bytes


class Total(NamedTuple):
    """A sum of work."""

    flops: int
    weight_bytes: int
    activation_bytes: int

    @property
    def bytes(self) -> int:
        return self.weight_bytes + self.activation_bytes

    def floor(self, flops_per_second: float, bytes_per_second: float) -> float:
        """Seconds at the roofline, with arithmetic and memory access overlapped."""
        return max(self.flops / flops_per_second, self.bytes / bytes_per_second)


def total(work: Iterable[Work]) -> Total:
    items = list(work)
    return Total(
        sum(w.flops for w in items), sum(w.weight_bytes for w in items), sum(w.activation_bytes for w in items)
    )
