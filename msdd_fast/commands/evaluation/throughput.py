"""Images per second, in the two ways that must not be compared with each other."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

from msdd_fast.bench.timing.clock import now

OURS = "median call, after two others, of images that are on the device"
AUTHORS = "all batches of process 0: copies of the originals, encode and decode, from the first call on"


def warm(function: Callable[[], object], images: int, seconds: float) -> float:
    """Images per second of the median call, warm: called for ``seconds``, at least three times, after two calls."""
    for _ in range(2):
        function()
    samples: list[float] = []
    while len(samples) < 3 or sum(samples) < seconds:
        start = now()
        function()
        samples.append(now() - start)
    return images / statistics.median(samples)


def describe(ours: dict[str, float], authors: float | None, batch: int) -> dict[str, Any]:
    """Both ways for the report. ``authors`` is None if nothing was decoded in this way."""
    report: dict[str, Any] = {"ours": {**ours, "batch_size": batch, "how": OURS}}
    if authors is not None:
        report["authors"] = {"encode_decode_images_per_second": authors, "batch_size": batch, "how": AUTHORS}
    return report
