"""CUDA graphs: record a decode once, replay it with new inputs.

A graph reads and writes fixed memory. Its inputs are buffers that are filled before each replay; its results are
overwritten by the next replay.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from msdd_fast.layers.request import Inputs, StageImages

T = TypeVar("T")
WARM_UP_RUNS = 3


class Recorder:
    """Records work on one device as graphs that share one memory pool, so only one of them may run at a time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    @contextmanager
    def stream(self) -> Iterator[None]:
        """Run the block after everything the caller's stream has been given, and before what it gets next."""
        caller = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(caller)
        with torch.cuda.stream(self._stream):
            yield
        caller.wait_stream(self._stream)

    def warm_up(self, run: Callable[[], Any]) -> None:
        """Load kernels and libraries, which a capture must not do."""
        with self.stream():
            for _ in range(WARM_UP_RUNS):
                run()
        torch.cuda.synchronize(self.device)

    def record(self, run: Callable[[], T]) -> tuple[Callable[[], None], T]:
        """(replay, result of ``run``), the latter in memory that every replay overwrites."""
        graph = torch.cuda.CUDAGraph()
        # Thread-local: other threads may go on using the device.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            result = run()
        return graph.replay, result

    def memory(self) -> int:
        """Bytes that the pool holds."""
        segments = torch.cuda.memory_snapshot()
        return sum(s["total_size"] for s in segments if s.get("segment_pool_id") == self._pool)


class AnyRecorder(Protocol):
    """What graphs need of a recorder: this file's, or that of engine/programs.py."""

    def stream(self) -> AbstractContextManager[None]: ...

    def warm_up(self, run: Callable[[], Any]) -> None: ...

    def record(self, run: Callable[[], T]) -> tuple[Callable[[], None], T]: ...

    def memory(self) -> int: ...


class Graph:
    """A whole decode of one batch size."""

    def __init__(
        self, recorder: AnyRecorder, lock: threading.Lock, example: Inputs, decode: Callable[[Inputs], Tensor]
    ) -> None:
        """``lock`` is shared by all graphs of the recorder; it is not taken here."""
        self.inputs, self._recorder, self._lock = buffers(example), recorder, lock
        recorder.warm_up(lambda: decode(self.inputs))
        self._replay, self._images = recorder.record(lambda: decode(self.inputs))

    def replay(self, inputs: Inputs, out: Tensor | None = None) -> Tensor:
        """Images of ``inputs``, of at most the graph's batch size, copied to ``out``.

        Without ``out`` they are the graph's own memory, which the next replay overwrites.
        """
        with self._lock, self._recorder.stream():
            fill(self.inputs, inputs)
            self._replay()
            images = self._images[: len(inputs.z)]
            return images if out is None else out.copy_(images)


class StageGraphs:
    """A decode of one batch size, one graph per stage, in a pool of their own: decodes may run between its stages.

    On a CPU the images of a stage are made outside of its program, by what a program cannot record.
    """

    def __init__(
        self,
        recorder: AnyRecorder,
        example: Inputs,
        stages: Callable[[Inputs], Iterator[Any]],
        images: Callable[[int, Any, Inputs], StageImages],
        count: int,
    ) -> None:
        """``stages`` yields ``count`` ends of stages, of which ``images`` makes pictures."""
        self.inputs, self._recorder, self._images = buffers(example), recorder, images
        self._claimed = threading.Lock()
        recorder.warm_up(lambda: list(stages(self.inputs)))
        iterator = stages(self.inputs)
        self._graphs = [recorder.record(lambda: next(iterator)) for _ in range(count)]

    def claim(self) -> bool:
        """Whether the caller may ``replay``: False while another replay is going on, whose end releases the claim."""
        return self._claimed.acquire(blocking=False)

    def replay(self, inputs: Inputs) -> Iterator[StageImages]:
        """Replay stage by stage, and yield the results, which are the caller's. Needs a ``claim``."""
        try:
            with self._recorder.stream():
                fill(self.inputs, inputs)
            for stage, (replay, end) in enumerate(self._graphs):
                with self._recorder.stream():
                    replay()
                    piece = self._images(stage, end, self.inputs)
                    piece = StageImages(stage, _own(piece.images, end), _own(piece.state, end))
                yield piece
        finally:
            self._claimed.release()


def _own(x: Tensor, end: Any) -> Tensor:
    """``x``, copied if it is the graph's memory."""
    parts = (end,) if isinstance(end, Tensor) else end
    return x.clone() if any(x is part for part in parts) else x


def buffers(example: Inputs) -> Inputs:
    """Memory for inputs, which holds the example's."""
    z, seeds, scale, conditions = example
    return Inputs(z.clone(), seeds.clone(), scale.clone(), tuple(c.clone() for c in conditions))


def fill(buffers: Inputs, inputs: Inputs) -> None:
    """Copy inputs into buffers of at least their batch size. Padding keeps what was there, which is finite."""
    count = len(inputs.z)
    buffers.z[:count].copy_(inputs.z, non_blocking=True)
    buffers.seeds[:count].copy_(inputs.seeds, non_blocking=True)
    buffers.scale.copy_(inputs.scale, non_blocking=True)
    for buffer, condition in zip(buffers.conditions, inputs.conditions, strict=True):
        buffer[:count].copy_(condition, non_blocking=True)
