"""Recorded programs for CPUs: what CUDA graphs are for GPUs (engine/graphs.py), with the same interface."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, TypeVar

from torch import Tensor

from msdd_fast.backends import extension_status, use_backend
from msdd_fast.backends.choice import is_automatic
from msdd_fast.engine.graphs import buffers
from msdd_fast.layers.request import Inputs
from msdd_fast.native.program import CHUNK, Arena, ImageProgram, Recorded, record, replay_images, trim_heap

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


class ParallelDecode:
    """Decodes of any number of images, one by one, by a program for each thread; they share nothing.

    No thread waits for another or reads what another has written, and a program's memory is that of one image, which
    stays in its core's cache.
    """

    def __init__(
        self,
        recorders: Sequence[ProgramRecorder],
        lock: threading.Lock,
        example: Inputs,
        decode: Callable[[Inputs], Tensor],
    ) -> None:
        """As of ``graphs.Graph``, but with a recorder for each thread; ``example`` and ``decode`` are of one image."""
        self._lock = lock
        self._programs: list[ImageProgram] = []
        self._scales: list[Tensor] = []
        for recorder in recorders:
            inputs = buffers(example)
            run = partial(_decode_densely, decode, inputs)
            recorder.warm_up(run)
            program, image = recorder.program(run)
            self._programs.append(ImageProgram(program, _by_image(inputs), (image,)))
            self._scales.append(inputs.scale)

    def replay(self, inputs: Inputs, out: Tensor | None = None) -> Tensor:
        """Images of ``inputs`` in ``out``, which is contiguous, or in new memory."""
        if out is None:
            (image,) = self._programs[0].results
            out = image.new_empty(len(inputs.z), *image.shape[1:])
        given = [t.resolve_neg().contiguous() for t in _by_image(inputs)]
        with self._lock:
            for scale in self._scales:
                scale.copy_(inputs.scale)
            replay_images(self._programs, given, [out])
        return out


def _by_image(inputs: Inputs) -> tuple[Tensor, ...]:
    """Those inputs that every image has its own of."""
    return inputs.z, inputs.seeds, *inputs.conditions


def _decode_densely(decode: Callable[[Inputs], Tensor], inputs: Inputs) -> Tensor:
    return decode(inputs).contiguous()


def _native_attention() -> AbstractContextManager[None]:
    """Where the choice is ours, the C++ attention at every size: PyTorch's cannot be recorded.

    For the fewest queries PyTorch's measured faster, but by less than a program saves.
    """
    return use_backend("attention=cpu") if is_automatic() else nullcontext()


def can_record() -> tuple[bool, str]:
    """Whether programs can be recorded, and why not."""
    loaded, reason = extension_status()
    if not loaded:
        return False, f"programs need msdd_fast._C, which {reason}"
    return True, "a program for each thread; below two images a thread one per batch size"
