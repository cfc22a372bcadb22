"""Recorded programs for CPUs: what CUDA graphs are for GPUs (engine/graphs.py), with the same interface."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

from msdd_fast.backends import extension_status, use_backend
from msdd_fast.backends.choice import is_automatic
from msdd_fast.native.program import Arena, record

T = TypeVar("T")


class ProgramRecorder:
    """Records work as native programs that share one arena, so only one of them may run at a time."""

    def __init__(self) -> None:
        self._arena = Arena()

    @contextmanager
    def stream(self) -> Iterator[None]:
        """A CPU has one order of work: nothing to wait for."""
        yield

    def warm_up(self, run: Callable[[], Any]) -> None:
        """Let every op choose its backend, which asks for values that a recording must not read."""
        with _native_attention():
            run()

    def record(self, run: Callable[[], T]) -> tuple[Callable[[], None], T]:
        """(replay, result of ``run``), the latter in memory that every replay overwrites.

        Raises NotRecordableError if ``run`` computes something outside native ops.
        """
        with _native_attention():
            program, result = record(run, self._arena)
        return program.replay, result

    def memory(self) -> int:
        """Bytes of the arena."""
        return self._arena.memory()


def _native_attention() -> AbstractContextManager[None]:
    """Where the choice is ours, the C++ attention at every size: PyTorch's cannot be recorded.

    For the fewest queries PyTorch's measured faster, but by less than a program saves.
    """
    return use_backend("attention=cpu") if is_automatic() else nullcontext()


def can_record() -> tuple[bool, str]:
    """Whether programs can be recorded, and why not."""
    loaded, reason = extension_status()
    return loaded, "one program per batch size" if loaded else f"programs need msdd_fast._C, which {reason}"
