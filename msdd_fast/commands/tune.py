"""Measure which attention backend is fastest on this machine, for the table of MSDD_FAST_TUNED.

Every backend that can run is timed in turn, round after round, and the medians are compared.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from msdd_fast.backends.tuned import machine
from msdd_fast.commands.common import pick_device, positive_int
from msdd_fast.io.files import atomic_write, require_writable
from msdd_fast.ops.attention import OP

DTYPES = ("bfloat16", "float16", "float32")
HEAD_SIZE = 64
# Queries of the coarse scales alone, then tokens of the joint blocks at 32, 64, 128 and 256 px.
QUERIES = (16, 64, 144, 192, 384, 1152)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default=None, help="torch device (default: cuda if there is one, else cpu)")
    parser.add_argument("--heads", type=positive_int, default=12, help="heads of an image (default: %(default)s)")
    parser.add_argument(
        "--rounds", type=positive_int, default=25, help="timings of each backend (default: %(default)s)"
    )
    parser.add_argument("--out", metavar="FILE", help="write the table here, whole or not at all (default: print it)")


def run(args: argparse.Namespace) -> None:
    if args.out:
        require_writable(args.out)
    device = pick_device(args.device)
    measured: dict[str, Any] = {}
    for dtype in DTYPES:
        rows = {str(n): _fastest(n, args.heads, getattr(torch, dtype), device, args.rounds) for n in QUERIES}
        measured[dtype] = {str(HEAD_SIZE): rows}
    text = json.dumps({machine(str(device)): {OP.name: measured}}, indent=2)
    if args.out:
        with atomic_write(args.out) as temporary:
            Path(temporary).write_text(text + "\n")
        print(f"to use it: export MSDD_FAST_TUNED={Path(args.out).absolute()}")
    else:
        print(text)


@torch.no_grad()
def _fastest(queries: int, heads: int, dtype: torch.dtype, device: torch.device, rounds: int) -> str:
    """Name of the fastest backend for one image's self-attention on views of a packed buffer."""
    q, k, v = torch.randn(1, queries, 3, heads, HEAD_SIZE, device=device).to(dtype).unbind(2)
    usable = [name for name, implementation in OP.implementations.items() if implementation.can_use(q, k, v)[0]]
    times = medians({name: partial(OP, q, k, v, backend=name) for name in usable}, device, rounds)
    return min(times, key=lambda name: times[name])


def medians(calls: dict[str, Callable[[], Any]], device: torch.device, rounds: int) -> dict[str, float]:
    """Median seconds of each call, waiting for the device; in turn, after one round that does not count."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t[1:]) for name, t in times.items()}
