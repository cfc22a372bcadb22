"""Being asked to stop: by a scheduler that preempts the job (SIGTERM), or by torchrun on its behalf."""

from __future__ import annotations

import signal
import threading
from typing import Any


class StopSignals:
    """Within the block SIGTERM only sets ``received``; the loop looks at it after every step."""

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
    """For the workers of a DataLoader: torchrun signals the whole process group, and they must outlive the save."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
