"""Fetch the next latents while the current ones decode."""

from __future__ import annotations

import atexit
import os
import threading
import time
from collections import deque
from collections.abc import Generator, Iterable

import torch
from torch import Tensor

DEPTH = 2
EXIT_SECONDS = 1.0
_END = object()


class _Ready:
    """At most DEPTH items between one thread that puts and one that takes."""

    def __init__(self) -> None:
        self._items: deque[object] = deque()
        self._changed = threading.Condition()
        self.stopped = False

    def put(self, item: object) -> bool:
        """Wait for room; False once stopped."""
        with self._changed:
            self._changed.wait_for(lambda: self.stopped or len(self._items) < DEPTH)
            if not self.stopped:
                self._items.append(item)
                self._changed.notify_all()
            return not self.stopped

    def take(self) -> object:
        with self._changed:
            self._changed.wait_for(lambda: bool(self._items))
            item = self._items.popleft()
            self._changed.notify_all()
            return item

    def stop(self) -> None:
        with self._changed:
            self.stopped = True
            self._changed.notify_all()


_threads: dict[threading.Thread, _Ready] = {}


@atexit.register
def _stop_all() -> None:
    """Python ends its daemon threads while it exits; one that is inside PyTorch then takes the process down with it.

    What waits in an iterable for longer than EXIT_SECONDS is left where it is.
    """
    running = list(_threads.items())
    for _, ready in running:
        ready.stop()
    end = time.monotonic() + EXIT_SECONDS
    for thread, _ in running:
        thread.join(max(0.0, end - time.monotonic()))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_threads.clear)  # a forked child has none of them


def prefetch(tensors: Iterable[Tensor], device: torch.device) -> Generator[Tensor, None, None]:
    """The tensors, in order and those of a CPU on a GPU ``device``, at most DEPTH ahead, read in a thread of its own.

    An error of the iterable is raised where its tensor would have come. Closing the generator stops the thread. If the
    iterable is waiting then, nothing waits for it: the thread ends when the iterable returns, and takes nothing more.
    """
    ready, reading = _Ready(), threading.Lock()

    def work() -> None:
        try:
            read()
        finally:
            _threads.pop(thread, None)

    def read() -> None:
        try:
            iterator = None
            while True:
                with reading:
                    if ready.stopped:
                        return
                    iterator = iter(tensors) if iterator is None else iterator
                    z = next(iterator, _END)
                if z is _END:
                    break
                if device.type == "cuda" and isinstance(z, Tensor) and z.device.type == "cpu":
                    z = z.pin_memory()  # lets the copy run while the device computes
                if not ready.put(z):
                    return
        except BaseException as error:
            ready.put(error)
        else:
            ready.put(_END)

    thread = threading.Thread(target=work, name="msdd-fast-prefetch", daemon=True)
    _threads[thread] = ready
    try:
        thread.start()
    except BaseException:
        del _threads[thread]
        raise
    try:
        while (item := ready.take()) is not _END:
            if isinstance(item, BaseException):
                raise item
            moves = device.type == "cuda" and isinstance(item, Tensor) and item.device.type == "cpu"
            yield item.to(device, non_blocking=True) if moves else item  # type: ignore[attr-defined, misc]
    finally:
        ready.stop()
        # In the iterable the thread may be for ever; anywhere else it ends at once, and does not enter it again.
        if reading.acquire(blocking=False):
            reading.release()
            thread.join()
