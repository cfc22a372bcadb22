"""How much memory an engine needs, and which batch sizes fit."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from msdd_fast.errors import InputError

CPU_SLACK = 1.5


def resident(activations: int, device: torch.device) -> int:
    """Bytes that ``activations`` bytes take of the memory of ``device``.

    On a CPU the heap of the C library keeps freed blocks that no later tensor fits: 160 to 197 MiB were resident where
    120 MiB were allocated at once.
    """
    return math.ceil(activations * CPU_SLACK) if device.type == "cpu" else activations


def available(room: int, device: torch.device) -> int:
    """Bytes of activations that take ``room`` bytes of the memory of ``device``: the inverse of ``resident``."""
    return math.floor(room / CPU_SLACK) if device.type == "cpu" else room


def fit(sizes: Sequence[int], max_memory: int | None, fixed: int, per_image: int) -> tuple[tuple[int, ...], list[str]]:
    """The batch sizes that fit in ``max_memory`` bytes, and what to say of the others.

    Raises InputError if none does.
    """
    if max_memory is None:
        return tuple(sizes), []
    fitting = tuple(s for s in sizes if fixed + s * per_image <= max_memory)
    if not fitting:
        needed = fixed + min(sizes) * per_image
        raise InputError(
            f"max_memory must be at least {needed} bytes (weights and tables {fixed}, batch {min(sizes)} "
            f"{min(sizes) * per_image}), got {max_memory}"
        )
    dropped = [s for s in sizes if s not in fitting]
    notes = [f"batch sizes {', '.join(map(str, dropped))} do not fit in max_memory={max_memory}"] if dropped else []
    return fitting, notes
