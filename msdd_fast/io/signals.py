"""Ctrl-C and SIGTERM, remembered: the exception that a handler raises can get lost on its way.

C code of other packages drops exceptions or puts its own in their place, as safetensors does while it reads a tensor. A
program that went on would write what it should not: without the extension, say, whose import the signal stopped.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType

_again: Callable[[], object] | None = None
"""Raises the exception of the last signal once more; None if there was none."""

Handler = Callable[[int, FrameType | None], object]


class TerminatedError(BaseException):
    """SIGTERM, as an exception: what is being written is cleaned up on the way out."""


@contextmanager
def remembered_signals() -> Iterator[None]:
    """Inside the block, Ctrl-C raises KeyboardInterrupt and SIGTERM TerminatedError; ``raise_if_received`` repeats it.

    Handlers that the caller has set stay in force: what they raise is repeated instead. An ignored Ctrl-C stays
    ignored. Outside the main thread, and inside another block, this one changes nothing.
    """
    global _again
    before = {}
    try:
        for number, default in ((signal.SIGTERM, _terminate), (signal.SIGINT, None)):
            handler = signal.getsignal(number)
            raising = handler if callable(handler) else default
            if raising is not None and not isinstance(raising, _Remembering):
                before[number] = signal.signal(number, _Remembering(raising))
    except ValueError:  # not in the main thread, which alone receives signals
        pass
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if before:
            _again = None


def raise_if_received() -> None:
    """Raise the exception of the last signal once more, if there was one."""
    if _again is not None:
        _again()


class _Remembering:
    """Calls ``handler``, and remembers it if it raises."""

    def __init__(self, handler: Handler) -> None:
        self.handler = handler

    def __call__(self, number: int, frame: FrameType | None) -> None:
        global _again
        _again = partial(self.handler, number, None)
        self.handler(number, frame)
        _again = None


def _terminate(number: int, frame: FrameType | None) -> None:
    raise TerminatedError
