"""How a batch is decoded in the memory that there is: in which way, and how many images at once."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from msdd_fast.diffusion.config import Config
from msdd_fast.errors import InputError
from msdd_fast.layers.request import WHOLE, DecodeProgram, Request, Way
from msdd_fast.native.program import room_for

MEBIBYTE = 2**20
CPU_SLACK = 1.8
"""Most bytes by which a process grows for each byte of a decode's tensors on a CPU: the C library's heap keeps freed
blocks that no later tensor fits. It was 185 to 206 MiB for 120 (ssdd-xs-f8c4 at 256 px)."""


class Plan(NamedTuple):
    """A way to decode a request.

    Attributes:
        way: how much of an image is worked on at a time.
        images: the most that run at once.
        bytes: predicted peak of all tensors: weights, tables, activations, images.
        needed: what that takes of ``max_memory``: on a CPU the heap's share of it, too.
    """

    way: Way
    images: int
    bytes: int
    needed: int

    def __str__(self) -> str:
        return f"{self.way}, {self.bytes / MEBIBYTE:.1f} MiB predicted"


class Budget:
    """Predicts what decodes take and chooses among the ways to do them.

    Args:
        fixed: bytes of weights and tables.
        limit: bytes of everything; None for no limit.
        most: images that run at once if there is room.
        slack: bytes of the device's memory for each byte of activations.

    Attributes:
        granule: of the memory that graphs keep, bytes; 0 without graphs.
        graphed_at_once: how many images a graph of a batch works on at the same time.
    """

    def __init__(
        self, program: DecodeProgram, config: Config, fixed: int, limit: int | None, most: int, slack: float
    ) -> None:
        self.program, self.config, self.fixed, self.limit, self.most = program, config, fixed, limit, most
        self.slack = slack
        self.granule = 0
        self.graphed_at_once: Callable[[int], int] = lambda batch: batch

    def predict(self, request: Request, at_once: int, recorded: bool = True) -> int:
        """Peak bytes of a decode in the request's way, ``at_once`` images at a time; ``recorded`` if it can be."""
        batch, size = request.shape[0], request.out_dtype.itemsize * math.prod(request.image_shape(self.config))
        is_graph = recorded and self.granule and request.way == WHOLE
        activations = self._of_graph(request, at_once) if is_graph else self._activations(request, at_once)
        # What a graph, or a part of the batch, leaves is copied.
        return self.fixed + activations + (size * batch if is_graph or at_once < batch else 0)

    def _activations(self, request: Request, images: int) -> int:
        return self.program.activations(request.with_batch(images))

    def _of_graph(self, request: Request, batch: int) -> int:
        """Bytes that the graph of a batch keeps for activations."""
        apart = self.graphed_at_once(batch)
        if apart != batch:  # each of these images has memory of its own
            return apart * room_for(self._activations(request, 1), self.granule // apart)
        activations = self._activations(request, batch)
        return room_for(activations, self.granule) if self.granule > 1 else activations

    def needed(self, request: Request, at_once: int) -> int:
        """What a decode takes of the limit."""
        return self.fixed + self.held(self.predict(request, at_once, recorded=False) - self.fixed)

    def held(self, activations: int) -> int:
        """Bytes of the device's memory that activations take."""
        return math.ceil(activations * self.slack)

    def plans(self, request: Request, ways: Sequence[Way]) -> list[Plan]:
        """Those that fit, from the fastest to the smallest: in each way as many images at once as fit, then one.

        Raises InputError with the figures if none does.
        """
        if self.limit is None:
            return [self._plan(request, ways[0], self.most)]
        found: list[Plan] = []
        for way in ways:
            wanted = request._replace(way=way)
            sizes = range(1, self.most + 1)
            fitting = bisect_right(sizes, self.limit, key=lambda n: self.needed(wanted, n))
            found += [self._plan(request, way, n) for n in dict.fromkeys((fitting, min(fitting, 1))) if n]
        if found:
            return found
        least = min((self._plan(request, way, 1) for way in ways), key=lambda plan: plan.needed)
        raise InputError(
            f"max_memory must be at least {least.needed} bytes for z of shape {tuple(request.shape)} (weights and "
            f"tables {self.fixed}, the rest {least.way}), got {self.limit}"
        )

    def _plan(self, request: Request, way: Way, images: int) -> Plan:
        now = min(images, max(1, request.shape[0]))
        wanted = request._replace(way=way)
        return Plan(way, images, self.predict(wanted, now), self.needed(wanted, now))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is no memory for a tensor, on a GPU or a CPU."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    says = str(error)
    return isinstance(error, RuntimeError) and ("can't allocate memory" in says or "not enough memory" in says)
