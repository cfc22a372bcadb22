"""The ceilings of the hardware, measured in the same run: copy bandwidth and matrix multiplication."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from msdd_fast.bench.timing.clock import timer_for

DEFAULT_CACHE = 32 * 2**20
SAMPLES = 7
GEMM_SECONDS = 1e-2


def last_level_cache(device: torch.device) -> int:
    """Bytes of a GPU's L2, or of the CPU's largest cache (32 MiB where the system does not say)."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = [p.read_text().strip() for p in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(s[:-1]) * 1024 for s in sizes if s.endswith("K")), default=DEFAULT_CACHE)


@functools.cache
def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read plus written, of ``Tensor.copy_`` over at least four times the last-level cache."""
    size = max(4 * last_level_cache(device), 2**30 if device.type == "cuda" else 0)
    source, target = (torch.ones(size, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * size / _seconds(lambda: target.copy_(source), device)


@functools.cache
def gemm_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP per second of ``torch.mm(a, w.t())``, the product of a linear layer, on square random matrices.

    Their side is 8192 on a GPU. On a CPU it is 256, doubled until one product takes 10 ms: rates of CPUs differ by a
    factor of a hundred.
    """
    n = 8192 if device.type == "cuda" else 256
    while True:
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        seconds = _seconds(functools.partial(torch.mm, a, b.t()), device)
        if device.type == "cuda" or seconds > GEMM_SECONDS:
            return 2 * n**3 / seconds
        n *= 2


def floor_seconds(device: torch.device, dtype: torch.dtype, num_bytes: int, flops: int = 0) -> float:
    """The least time for this many bytes and FLOP by the measured ceilings: the roofline."""
    arithmetic = flops / gemm_rate(device, dtype) if flops else 0.0
    return max(num_bytes / copy_bandwidth(device), arithmetic)


def _seconds(function: Callable[[], Any], device: torch.device) -> float:
    timer = timer_for(device)
    function()
    return min(timer.seconds(function, 1) for _ in range(SAMPLES))
