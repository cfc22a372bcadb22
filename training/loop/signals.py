"""SIGTERM and Ctrl-C: a scheduler that preempts the job, torchrun on its behalf, or a person asks the run to stop."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from typing import Any

from msdd_fast.io.signals import raise_if_received

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# Under torchrun one Ctrl-C arrives twice: from the terminal and from torchrun.
SAME_CTRL_C = 1.0


class StopSignals:
    """Inside the block, SIGTERM and Ctrl-C only set ``received``, which the loop checks after every step.

    A second Ctrl-C raises KeyboardInterrupt.
    """

    def __init__(self) -> None:
        self.received = 0
        """Number of the first signal, or 0."""
        self._interrupted: float | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        raise_if_received()  # one whose exception got lost must not become a run that goes on
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._receive) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: Any) -> None:
        self.received = self.received or number
        if number != signal.SIGINT:
            return
        now = time.monotonic()
        if self._interrupted is None:
            self._interrupted = now
            with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or none
                os.write(sys.stderr.fileno(), b"\nsaving after this step; Ctrl-C again leaves at once\n")
        elif "WORLD_SIZE" not in os.environ or now - self._interrupted > SAME_CTRL_C:
            before = self._before[number]
            if callable(before):
                before(number, frame)  # remembers it in a program: its exception may get lost on its way
            raise KeyboardInterrupt


def ignore_stop_signals(worker: int) -> None:
    """For DataLoader workers: the whole process group gets the signals, and the workers must live until the save."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
