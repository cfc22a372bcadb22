"""CUDA graphs: record a decode of one batch size once, replay it with new inputs.

A recording reads and writes fixed memory. Its inputs are buffers of its own, filled before each replay; its results
are overwritten by the next replay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch

from msdd_fast.layers.request import Inputs

T = TypeVar("T")
R = TypeVar("R")
WARM_UP_RUNS = 3


class Recorder:
    """Records pieces of work of one device as graphs that share one memory pool.

    Graphs of one pool must not run at the same time; FastDecoder's lock sees to it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    @contextmanager
    def stream(self) -> Iterator[None]:
        """What is inside runs after all that the caller's stream has been given, and before what it gets next."""
        caller = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(caller)
        with torch.cuda.stream(self._stream):
            yield
        caller.wait_stream(self._stream)

    def warm_up(self, run: Callable[[], Any]) -> None:
        """Loads kernels and libraries, which a capture must not do."""
        with self.stream():
            for _ in range(WARM_UP_RUNS):
                run()
        torch.cuda.synchronize(self.device)

    def record(self, run: Callable[[], T]) -> tuple[Callable[[], None], T]:
        """(replay, result of ``run``), the latter in memory that every replay fills anew."""
        graph = torch.cuda.CUDAGraph()
        # Thread-local: other threads may go on using the device.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            result = run()
        return graph.replay, result

    def memory(self) -> int:
        """Bytes that the pool holds."""
        segments = torch.cuda.memory_snapshot()
        return sum(s["total_size"] for s in segments if s.get("segment_pool_id") == self._pool)


class Recording(Generic[T]):
    """The first ``count`` results of a generator, one graph each, over static inputs."""

    def __init__(self, recorder: Recorder, inputs: Inputs, pieces: Callable[[Inputs], Iterator[T]], count: int) -> None:
        self.inputs, self._recorder = Inputs(*(t.clone() for t in inputs)), recorder
        recorder.warm_up(lambda: list(pieces(self.inputs)))
        iterator = pieces(self.inputs)
        self._graphs = [recorder.record(lambda: next(iterator)) for _ in range(count)]

    def __call__(self, inputs: Inputs, take: Callable[[T], R]) -> Iterator[R]:
        """Fill in the images (the rest of the batch is padding), replay piece by piece, yield ``take(result)``.

        ``take`` copies what it wants to keep.
        """
        with self._recorder.stream():
            fill(self.inputs, inputs)
        for replay, result in self._graphs:
            with self._recorder.stream():
                replay()
                taken = take(result)
            yield taken


def fill(buffers: Inputs, inputs: Inputs) -> None:
    """Copy inputs into buffers of at least their batch size; padding keeps what was there, which is finite."""
    count = len(inputs.z)
    buffers.z[:count].copy_(inputs.z, non_blocking=True)
    buffers.seeds[:count].copy_(inputs.seeds, non_blocking=True)
    buffers.scale.copy_(inputs.scale, non_blocking=True)
