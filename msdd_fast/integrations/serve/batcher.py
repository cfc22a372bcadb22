"""Micro-batching: latents of many callers wait in a bounded queue, one thread decodes them together."""

from __future__ import annotations

import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from msdd_fast.engine import FastDecoder


class QueueFullError(Exception):
    """There is no room; ``retry_after`` is in how many seconds there should be."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"the queue is full: try again in {retry_after} s")
        self.retry_after = retry_after


class ClosedError(Exception):
    """The batcher takes nothing more."""


class Kind(NamedTuple):
    """What the latents of one batch have in common."""

    shape: tuple[int, ...]
    cfg_scale: float | None
    out_dtype: torch.dtype


@dataclass(eq=False)
class _Waiting:
    """One caller's latents (n, ...) and seeds (n,), and where its images go."""

    z: Tensor
    seeds: Tensor
    kind: Kind
    images: Future[Tensor] = field(default_factory=Future)
    since: float = field(default_factory=time.monotonic)

    @property
    def count(self) -> int:
        return len(self.z)


class Batcher:
    """Decodes the latents of many callers in batches of at most the engine's largest.

    Every image has its own seed, so that batching changes no image beyond rounding. While a batch is decoded the next
    one gathers. The oldest request decides what kind of latents comes next, so that none starves.

    Args:
        engine: warmed up by ``start``, in the thread that uses it.
        max_wait: seconds that a request waits for its batch to fill.
        max_queue: images that may wait.
        on_batch: told the images and seconds of every batch, in the batcher's thread.
    """

    def __init__(
        self,
        engine: FastDecoder,
        max_wait: float = 0.002,
        max_queue: int = 256,
        on_batch: Callable[[int, float], None] = lambda images, seconds: None,
    ) -> None:
        self.engine, self.max_wait, self.max_queue, self.on_batch = engine, max_wait, max_queue, on_batch
        self.max_batch = max(engine.batch_sizes)
        self.waiting = 0
        self._queue: deque[_Waiting] = deque()
        self._of_kind: Counter[Kind] = Counter()  # images in the queue
        self._changed = threading.Condition()
        self._closed = False
        self._seconds_per_image = 0.1
        self._thread = threading.Thread(target=self._run, name="msdd-fast-batcher", daemon=True)
        self._ready: Future[None] = Future()

    def start(self) -> Future[None]:
        """Start the thread; the future is done when the engine is warm. Call once."""
        self._thread.start()
        return self._ready

    @property
    def alive(self) -> bool:
        """Whether what is submitted will be decoded."""
        return self._thread.is_alive() and not self._closed

    def submit(
        self,
        z: Tensor,
        seeds: Tensor,
        *,
        cfg_scale: float | None = None,
        out_dtype: torch.dtype = torch.uint8,
    ) -> Future[Tensor]:
        """Images (n, 3, H, W) on the CPU of latents (n, ...), as ``FastDecoder.decode`` gives them.

        The latents are trusted: check them first. A future that is cancelled before its batch begins leaves the queue.
        Raises QueueFullError if there is no room for n images, ClosedError after ``close``.
        """
        item = _Waiting(z, seeds, Kind(tuple(z.shape[1:]), cfg_scale, out_dtype))
        with self._changed:
            if not self.alive:
                raise ClosedError
            if self.waiting + item.count > self.max_queue:
                raise QueueFullError(self.retry_after())
            self._queue.append(item)
            self._count(item, 1)
            self._changed.notify()
        item.images.add_done_callback(lambda _: self._forget(item))
        return item.images

    def retry_after(self) -> int:
        """Whole seconds until what waits now should be decoded: 1 to 60."""
        return min(max(math.ceil(self.waiting * self._seconds_per_image), 1), 60)

    def close(self) -> None:
        """Decode what waits, take nothing more, and wait for the end."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread.ident is not None:
            self._thread.join()

    def _count(self, item: _Waiting, sign: int) -> None:
        self.waiting += sign * item.count
        self._of_kind[item.kind] += sign * item.count
        if not self._of_kind[item.kind]:
            del self._of_kind[item.kind]

    def _forget(self, item: _Waiting) -> None:
        """Take what was cancelled out of the queue."""
        if not item.images.cancelled():
            return
        with self._changed:
            if item in self._queue:
                self._queue.remove(item)
                self._count(item, -1)

    def _run(self) -> None:
        try:
            self.engine.warmup()
        except BaseException as error:
            self._ready.set_exception(error)
            return
        self._ready.set_result(None)
        try:
            while batch := self._next():
                self._decode(batch)
        finally:
            self._fail_the_rest()

    def _fail_the_rest(self) -> None:
        """Nobody waits for a thread that has ended, whatever ended it."""
        with self._changed:
            self._closed = True
            rest = list(self._queue)
            self._queue.clear()
        for item in rest:
            if item.images.set_running_or_notify_cancel():
                item.images.set_exception(ClosedError())

    def _next(self) -> list[_Waiting]:
        """What is decoded together; nothing when the batcher is closed and the queue is empty."""
        with self._changed:
            while True:
                self._changed.wait_for(lambda: self._queue or self._closed)
                if not self._queue:
                    return []
                first = self._queue[0]
                left = first.since + self.max_wait - time.monotonic()
                self._changed.wait_for(partial(self._is_full, first.kind), max(0.0, left))
                if batch := self._take():
                    return batch

    def _is_full(self, kind: Kind) -> bool:
        return self._closed or self._of_kind[kind] >= self.max_batch

    def _take(self) -> list[_Waiting]:
        """The oldest in the queue and those of its kind that fit beside it."""
        batch: list[_Waiting] = []
        left: deque[_Waiting] = deque()
        images = 0
        while self._queue and (not batch or images < self.max_batch):
            item = self._queue.popleft()
            if batch and (item.kind != batch[0].kind or images + item.count > self.max_batch):
                left.append(item)
                continue
            self._count(item, -1)
            if item.images.set_running_or_notify_cancel():
                batch.append(item)
                images += item.count
        self._queue.extendleft(reversed(left))
        return batch

    def _decode(self, batch: list[_Waiting]) -> None:
        kind, begin = batch[0].kind, time.perf_counter()
        try:
            z, seeds = torch.cat([b.z for b in batch]), torch.cat([b.seeds for b in batch])
            images = self.engine.decode(z, seeds, cfg_scale=kind.cfg_scale, out_dtype=kind.out_dtype).cpu()
        except Exception as error:
            if len(batch) == 1:
                batch[0].images.set_exception(error)
                return
            for item in batch:  # one of them is to blame: the others must not suffer for it
                self._decode([item])
            return
        except BaseException as error:  # ends the thread; nobody must wait for it
            for item in batch:
                item.images.set_exception(error)
            raise
        seconds = time.perf_counter() - begin
        self._seconds_per_image += 0.2 * (seconds / len(z) - self._seconds_per_image)
        try:
            self.on_batch(len(z), seconds)
        finally:
            for item, part in zip(batch, images.split([b.count for b in batch]), strict=True):
                item.images.set_result(part)
