"""SIGTERM: a scheduler that preempts the job, or torchrun on its behalf, asks the run to stop."""

from __future__ import annotations

import signal
import threading
from typing import Any


class StopSignals:
    """Inside the block, SIGTERM only sets ``received``, which the loop checks after every step."""

    def __init__(self) -> None:
        self.received = False
        self._before: Any = None

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._receive)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _receive(self, number: int, frame: Any) -> None:
        self.received = True


def ignore_stop_signals(worker: int) -> None:
    """For DataLoader workers: torchrun signals the whole process group, and the workers must live until the save."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
