"""What `tune` does: time everything that can run on this machine and make the table of the fastest."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from msdd_fast.backends.extension import extension_status
from msdd_fast.backends.tuned import machine
from msdd_fast.commands.output import say, steps
from msdd_fast.io.arguments import DTYPES, pick_device
from msdd_fast.io.files import STDOUT, is_standard_output, require_writable
from msdd_fast.io.json_files import write_json
from msdd_fast.layers.linear.base import Linear
from msdd_fast.layers.linear.dense import DenseLinear
from msdd_fast.layers.linear.native import NativeLinear, size_of
from msdd_fast.ops.attention import OP

HEAD_SIZE = 64
# Queries of the coarse scales alone, then tokens of the joint blocks at 32, 64, 128 and 256 px.
QUERIES = (16, 64, 144, 192, 384, 1152)
# Of linear: rows, and (in, out) of msdd-nano and msdd-d12.
ROWS = (4, 16, 64, 256, 1024)
SIZES = (
    *((32, 256), (192, 256), (256, 192), (256, 256), (256, 512), (256, 768), (256, 1408), (704, 256)),
    *((32, 768), (192, 768), (768, 192), (768, 768), (768, 1536), (768, 2304), (768, 4096), (2048, 768)),
)


def tune(args: argparse.Namespace) -> None:
    if args.out:
        require_writable(args.out)
    device = pick_device(args.device)
    measured: dict[str, Any] = {}
    linear = device.type == "cpu" and extension_status()[0]
    with steps(args, len(DTYPES) + linear) as step:
        for dtype in DTYPES:
            step(f"attention, {dtype}")
            rows = {str(n): _fastest(n, args.heads, getattr(torch, dtype), device, args.rounds) for n in QUERIES}
            measured[dtype] = {str(HEAD_SIZE): rows}
        table = {machine(str(device), OP.name): {OP.name: measured}}
        if linear:
            step("linear")
            table.setdefault(machine("cpu", "linear"), {})["linear"] = _linears(args.rounds)
    write_json(args.out or STDOUT, table)
    if args.out and not is_standard_output(args.out):
        say(args, f"to use it: export MSDD_FAST_TUNED={Path(args.out).absolute()}")


@torch.no_grad()
def _fastest(queries: int, heads: int, dtype: torch.dtype, device: torch.device, rounds: int) -> str:
    """Name of the fastest backend for one image's self-attention on views of a packed buffer."""
    q, k, v = torch.randn(1, queries, 3, heads, HEAD_SIZE, device=device).to(dtype).unbind(2)
    usable = [name for name, implementation in OP.implementations.items() if implementation.can_use(q, k, v)[0]]
    times = medians({name: partial(OP, q, k, v, backend=name) for name in usable}, device, rounds)
    return min(times, key=lambda name: times[name])


@torch.no_grad()
def _linears(rounds: int) -> dict[str, Any]:
    """{dtype: {size: {rows: "cpu" or "torch"}}}: the extension's product against what DenseLinear takes without it."""
    measured: dict[str, Any] = {"bfloat16": {}, "float32": {}}
    for name, sizes in measured.items():
        for inputs, out in SIZES:
            weight, bias = (torch.randn(shape).to(getattr(torch, name)) for shape in ((out, inputs), (out,)))
            linears: dict[str, Linear] = {"cpu": NativeLinear(weight, bias)}
            linears["torch"] = DenseLinear(weight, bias, taken={"torch"})
            rows = sizes[size_of(weight)] = {}
            for count in ROWS:
                x = torch.randn(count, inputs).to(weight.dtype)
                times = medians({n: partial(linear, x) for n, linear in linears.items()}, weight.device, rounds)
                rows[str(count)] = min(times, key=lambda name: times[name])
    return measured


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
