"""Counters of a service in the text format of Prometheus."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
IMAGES = (1, 2, 4, 8, 16, 32, 64, 128)


class Histogram:
    """How many values lie below each bound."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds, self.sum = bounds, 0.0
        self.counts = [0] * (len(bounds) + 1)

    def add(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def lines(self, name: str) -> Iterator[str]:
        total = 0
        for bound, count in zip((*self.bounds, "+Inf"), self.counts, strict=True):
            total += count
            yield f'{name}_bucket{{le="{bound}"}} {total}'
        yield f"{name}_sum {self.sum:.9g}"
        yield f"{name}_count {total}"


class Metrics:
    """What a service has done since it started. Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: Counter[int] = Counter()
        self._seconds, self._batches = Histogram(SECONDS), Histogram(IMAGES)
        self._decoding = 0.0

    def request(self, status: int, seconds: float) -> None:
        """A request was answered with this status; 499 is a client that went away."""
        with self._lock:
            self._requests[status] += 1
            if status == 200:
                self._seconds.add(seconds)

    def batch(self, images: int, seconds: float) -> None:
        """The engine decoded a batch."""
        with self._lock:
            self._batches.add(images)
            self._decoding += seconds

    def text(self, waiting: int, limit: int) -> str:
        """All of it, and the images that wait now, of how many that may."""
        with self._lock:
            return "\n".join(self._lines(waiting, limit)) + "\n"

    def _lines(self, waiting: int, limit: int) -> Iterator[str]:
        yield from _head("requests_total", "counter", "Decode requests by status code (499: the client went away).")
        for status, count in sorted(self._requests.items()):
            yield f'msdd_fast_requests_total{{code="{status}"}} {count}'
        yield from _head("request_seconds", "histogram", "From the head of a request to its answer, of status 200.")
        yield from self._seconds.lines("msdd_fast_request_seconds")
        yield from _head("batch_images", "histogram", "Images that were decoded together.")
        yield from self._batches.lines("msdd_fast_batch_images")
        yield from _head("decode_seconds_total", "counter", "Time that the engine was decoding.")
        yield f"msdd_fast_decode_seconds_total {self._decoding:.9g}"
        yield from _head("queue_images", "gauge", "Images that wait for the engine.")
        yield f"msdd_fast_queue_images {waiting}"
        yield from _head("queue_limit_images", "gauge", "Images that may wait.")
        yield f"msdd_fast_queue_limit_images {limit}"


def _head(name: str, kind: str, help: str) -> Iterator[str]:
    yield f"# HELP msdd_fast_{name} {help}"
    yield f"# TYPE msdd_fast_{name} {kind}"
