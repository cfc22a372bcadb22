"""Ctrl-C and SIGTERM, remembered: the exception that a handler raises can get lost on its way.

C code of other packages drops exceptions or puts its own in their place, as safetensors does while it reads a tensor. A
program that went on would write what it should not: without the extension, say, whose import the signal stopped.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_received: int | None = None


class TerminatedError(BaseException):
    """SIGTERM, as an exception: what is being written is cleaned up on the way out."""


@contextmanager
def remembered_signals() -> Iterator[None]:
    """Inside the block, Ctrl-C raises KeyboardInterrupt and SIGTERM TerminatedError; ``raise_if_received`` repeats it.

    A handler of the caller's own for Ctrl-C stays. Outside the main thread, the block changes nothing.
    """
    global _received
    _received, before = None, {}
    try:
        before[signal.SIGTERM] = signal.signal(signal.SIGTERM, _receive)
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            before[signal.SIGINT] = signal.signal(signal.SIGINT, _receive)
    except ValueError:  # not in the main thread
        pass
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _received = None


def raise_if_received() -> None:
    """Raise the exception of the last signal once more, if there was one."""
    if _received is not None:
        raise KeyboardInterrupt if _received == signal.SIGINT else TerminatedError


def _receive(number: int, frame: FrameType | None) -> None:
    global _received
    _received = number
    raise_if_received()
