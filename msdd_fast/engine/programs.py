"""Recorded programs for CPUs: what CUDA graphs are for GPUs (engine/graphs.py), with the same interface."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from msdd_fast.backends import extension_status, use_backend
from msdd_fast.backends.choice import is_automatic
from msdd_fast.engine.graphs import buffers, fill
from msdd_fast.layers.request import Inputs
from msdd_fast.native.program import CHUNK, Arena, Recorded, record, replay_together, trim_heap

T = TypeVar("T")


class ProgramRecorder:
    """Records work as native programs that share one arena, so only one of them may run at a time."""

    def __init__(self, chunk: int = CHUNK) -> None:
        """``chunk``: bytes in whose multiples the arena grows."""
        self._arena = Arena(chunk)
        self._room = 0

    @contextmanager
    def stream(self) -> Iterator[None]:
        """A CPU has one order of work: nothing to wait for."""
        yield

    def warm_up(self, run: Callable[[], Any]) -> None:
        """Let every op choose its backend, which asks for values that a recording must not read."""
        with _native_attention():
            run()
        trim_heap()  # or its tensors would lie beside the arena

    def record(self, run: Callable[[], T]) -> tuple[Callable[[], None], T]:
        """(replay, result of ``run``), the latter in memory that every replay overwrites.

        Raises NotRecordableError if ``run`` computes something outside native ops.
        """
        program, result = self.program(run)
        return program.replay, result

    def program(self, run: Callable[[], T]) -> tuple[Recorded, T]:
        """As ``record``, with the program itself."""
        self._arena.reserve(self._room)  # not before the warm-up
        with _native_attention():
            return record(run, self._arena)

    def reserve(self, activations: int) -> None:
        """Make room, when the next program is recorded, for its tensors, which take so many bytes at once."""
        self._room = activations

    def memory(self) -> int:
        """Bytes of the arena."""
        return self._arena.memory()


class _Part(NamedTuple):
    images: slice
    inputs: Inputs
    program: Recorded
    result: Tensor


class ParallelDecode:
    """A decode of one batch size in parts, which have a program and an arena each and are replayed at the same time.

    With a part for each thread, none waits for another or reads what another has written, which costs most where cores
    share no cache. The same interface as ``graphs.Graph``.
    """

    def __init__(
        self,
        recorders: Sequence[ProgramRecorder],
        lock: threading.Lock,
        example: Inputs,
        decode: Callable[[Inputs], Tensor],
    ) -> None:
        """As of ``Graph``, but with a recorder for each part; ``decode`` takes inputs of any number of images."""
        self._lock = lock
        self._parts: list[_Part] = []
        bounds = [len(example.z) * i // len(recorders) for i in range(len(recorders) + 1)]
        for recorder, begin, end in zip(recorders, bounds, bounds[1:], strict=False):
            images = slice(begin, end)
            inputs = buffers(example.part(images))
            recorder.warm_up(partial(decode, inputs))
            self._parts.append(_Part(images, inputs, *recorder.program(partial(decode, inputs))))

    def replay(self, inputs: Inputs, out: Tensor | None = None) -> Tensor:
        """Images of ``inputs``, of the batch size of the example, in ``out`` or new memory."""
        with self._lock:
            for part in self._parts:
                fill(part.inputs, inputs.part(part.images))
            replay_together([part.program for part in self._parts])
            return torch.cat([part.result for part in self._parts], out=out)


def _native_attention() -> AbstractContextManager[None]:
    """Where the choice is ours, the C++ attention at every size: PyTorch's cannot be recorded.

    For the fewest queries PyTorch's measured faster, but by less than a program saves.
    """
    return use_backend("attention=cpu") if is_automatic() else nullcontext()


def can_record() -> tuple[bool, str]:
    """Whether programs can be recorded, and why not."""
    loaded, reason = extension_status()
    return loaded, "one program per batch size and thread" if loaded else f"programs need msdd_fast._C, which {reason}"
