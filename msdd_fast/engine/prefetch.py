"""Fetch the next latents while the current ones decode."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

DEPTH = 2
_END = object()


def prefetch(tensors: Iterable[Tensor], device: torch.device) -> Iterator[Tensor]:
    """The tensors on ``device``, in order, at most DEPTH ahead, read in a thread of its own.

    An error of the iterable is raised where its tensor would have come. Closing the generator stops the thread.
    """
    ready: queue.Queue[object] = queue.Queue(DEPTH)
    stop = threading.Event()

    def put(item: object) -> bool:
        while not stop.is_set():
            try:
                ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for z in tensors:
                if device.type == "cuda" and isinstance(z, Tensor) and z.device.type == "cpu":
                    z = z.pin_memory()  # lets the copy run while the device computes
                if not put(z):
                    return
        except BaseException as error:
            put(error)
        else:
            put(_END)

    thread = threading.Thread(target=work, name="msdd-fast-prefetch", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not _END:
            if isinstance(item, BaseException):
                raise item
            yield item.to(device, non_blocking=True) if isinstance(item, Tensor) else item  # type: ignore[misc]
    finally:
        stop.set()
        thread.join()
