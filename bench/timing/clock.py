"""Seconds of one call, on the CPU and on a GPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, Protocol

import torch

CPU_SAMPLE_S = 5e-3
GPU_CALLS = 5
MAX_CALLS = 1000
FLUSH_BYTES = 2**30


class Timer(Protocol):
    """A clock for ``harness.compare``."""

    def calls(self, function: Callable[[], Any]) -> int:
        """Calls of one sample."""

    def seconds(self, function: Callable[[], Any], calls: int) -> float:
        """One sample: seconds per call over ``calls`` calls, with all their work done."""


class CpuTimer:
    """Wall clock around enough calls to fill ``sample_s``. Caches stay warm."""

    def __init__(self, sample_s: float = CPU_SAMPLE_S) -> None:
        self.sample_s = sample_s

    def calls(self, function: Callable[[], Any]) -> int:
        return min(max(1, round(self.sample_s / self.seconds(function, 1))), MAX_CALLS)

    def seconds(self, function: Callable[[], Any], calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            function()
        return (time.perf_counter() - start) / calls


class GpuTimer:
    """CUDA events around each call, the L2 cache overwritten before it; one sample is the median of its calls.

    While the GPU overwrites 1 GiB (well over 100 us), the CPU queues the call. So the sample is the GPU's work without
    the launch, as in a CUDA graph, unless launching takes longer than that.
    """

    def __init__(self, device: torch.device) -> None:
        size = max(FLUSH_BYTES, 4 * torch.cuda.get_device_properties(device).L2_cache_size)
        self.device, self.flush = device, torch.empty(size, dtype=torch.uint8, device=device)

    def calls(self, function: Callable[[], Any]) -> int:
        return GPU_CALLS

    def seconds(self, function: Callable[[], Any], calls: int) -> float:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
        for start, end in events:
            self.flush.zero_()
            start.record()
            function()
            end.record()
        torch.cuda.synchronize(self.device)
        return statistics.median(start.elapsed_time(end) for start, end in events) * 1e-3


class WallTimer:
    """Wall clock around single calls and all the work that they queue: the caller's waiting time."""

    def calls(self, function: Callable[[], Any]) -> int:
        return 1

    def seconds(self, function: Callable[[], Any], calls: int) -> float:
        start = now()
        for _ in range(calls):
            function()
        return (now() - start) / calls


def timer_for(device: torch.device, sample_s: float = CPU_SAMPLE_S) -> Timer:
    return GpuTimer(device) if device.type == "cuda" else CpuTimer(sample_s)


def now() -> float:
    """perf_counter, after all work queued on the GPU if this process uses one."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()
