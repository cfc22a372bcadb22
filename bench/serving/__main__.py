"""Load test of ``msdd-fast serve`` on this machine's loopback, beside the engine's own throughput in the same run.

    python -m msdd_fast.bench.serving [--checkpoint msdd-nano] [--seconds 5] [--turns 5] [--bad 10000] [--json out.json]

Starts a server and takes turns: the engine alone, in batches of ``--max-batch``, and as many requests for raw images as
``--connections`` connections keep waiting. Then requests at random times (Poisson) at fractions of that throughput,
every image format, and ``--bad`` requests that must be refused while good ones go on. Client and server share the
machine's cores, which lowers what the server reaches. Every answer is compared with the engine's images. Exits with 1
if an answer was wrong or lost.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from msdd_fast.bench.report.text import aligned, number
from msdd_fast.bench.serving.client import Connection
from msdd_fast.bench.serving.load import PERCENTILES, Load, misuse, poisson, saturate
from msdd_fast.bench.serving.work import FORMATS, LATENTS, requests
from msdd_fast.bench.timing.machine import machine_info
from msdd_fast.engine import FastDecoder, accelerate
from msdd_fast.errors import BackendUnavailableError
from msdd_fast.io.json_files import write_json
from msdd_fast.io.program import run_program
from msdd_fast.tokenizer import Tokenizer

LOADS = (0.5, 0.8)
STARTED = "serving on "


@contextmanager
def server(checkpoint: str, max_batch: int, options: Sequence[str] = ()) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server of its own process on a free port, and its URL; it is stopped at the end."""
    command = [sys.executable, "-m", "msdd_fast", "serve", "--port", "0", "--checkpoint", checkpoint]
    process = subprocess.Popen([*command, "--max-batch", str(max_batch), *options], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        if not line.startswith(STARTED):
            raise BackendUnavailableError("the server did not start")
        yield process, line.removeprefix(STARTED).split()[0]
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        process.wait(60)
        process.stdout.close()


def engine_rate(engine: FastDecoder, batch: int, seconds: float) -> float:
    """Images a second of full batches to uint8 on the CPU."""
    z = torch.randn(batch, *engine.family.example, generator=torch.Generator().manual_seed(0))
    begin, count = time.perf_counter(), 0
    while time.perf_counter() - begin < seconds:
        engine.decode(z, count, out_dtype=torch.uint8).cpu()
        count += batch
    return count / (time.perf_counter() - begin)


def row(name: str, load: Load) -> list[str]:
    return [name, number(load.rate), *(number(p) for p in load.percentiles()), str(sum(load.faults.values()))]


def plain(load: Load) -> dict[str, Any]:
    """For the JSON."""
    times = {f"p{p}_ms": value for p, value in zip(PERCENTILES, load.percentiles(), strict=True)}
    return {"images_per_second": load.rate, **times, "requests": len(load.seconds), "faults": dict(load.faults)}


async def metrics(url: str) -> dict[str, float]:
    """What /metrics says, without labels' lines."""
    response = await Connection(url).request("GET", "/metrics")
    lines = (line.split() for line in response.body.decode().splitlines() if line[0] != "#" and "{" not in line)
    return {name: float(value) for name, value in lines}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="msdd-nano")
    parser.add_argument("--seconds", type=float, default=5.0, help="of every measurement (default: %(default)g)")
    parser.add_argument("--turns", type=int, default=5, help="of engine and server (default: %(default)s)")
    parser.add_argument("--max-batch", type=int, default=8)
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--bad", type=int, default=0, help="bad requests at the end (default: none)")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = Tokenizer.from_pretrained(args.checkpoint).to(device)
    engine = accelerate(tokenizer, batch_sizes=(args.max_batch,), validate=True)
    engine.warmup()
    work = requests(engine, LATENTS)
    result: dict[str, Any] = {"options": vars(args), "engine": repr(engine), "machine": machine_info()}
    faults = 0
    with server(args.checkpoint, args.max_batch) as (process, url):
        asyncio.run(saturate(url, work, args.connections, 1.0))  # every batch size is recorded, every code path warm
        engines, loads = [], []
        for _ in range(args.turns):
            engines.append(engine_rate(engine, args.max_batch, args.seconds))
            loads.append(asyncio.run(saturate(url, work, args.connections, args.seconds)))
        own, reached = statistics.median(engines), statistics.median(load.rate for load in loads)
        ratios = [load.rate / rate for load, rate in zip(loads, engines, strict=True)]
        print(f"{engine!r}")
        print(f"engine {own:.1f} img/s, served {reached:.1f} img/s: {statistics.median(ratios):.1%} of it")
        print(f"  (medians of {args.turns} turns of {args.seconds:g} s; {min(ratios):.1%} to {max(ratios):.1%})")
        result["engine_images_per_second"], result["ratios"] = engines, ratios
        result["saturated"] = [plain(load) for load in loads]
        rows = [["load", "img/s", *(f"p{p} ms" for p in PERCENTILES), "wrong"]]
        whole = Load([s for load in loads for s in load.seconds], sum(load.images for load in loads))
        whole.elapsed = sum(load.elapsed for load in loads)
        for load in loads:
            whole.faults += load.faults
        rows.append(row(f"{args.connections} connections", whole))
        measured = [whole]
        for part in LOADS:
            load = asyncio.run(poisson(url, work, part * reached, args.seconds, 4 * args.connections))
            rows.append(row(f"{part:.0%} of that", load))
            measured.append(load)
            result[f"poisson_{part:.0%}"] = plain(load)
        for name in FORMATS:
            files = requests(engine, LATENTS, image_format=name)
            load = asyncio.run(saturate(url, files, args.connections, args.seconds))
            rows.append(row(f"{args.connections} connections, {name}", load))
            measured.append(load)
            result[name] = plain(load)
        print(*aligned(rows), sep="\n")
        faults = sum(sum(load.faults.values()) for load in measured)
        for text, count in itertools.chain.from_iterable(load.faults.items() for load in measured):
            print(f"{count} x {text}", file=sys.stderr)
        if args.bad:
            found = asyncio.run(misuse(url, engine, args.bad, args.connections, work))
            faults += sum(found["answered_wrongly"].values()) + sum(found["good_requests_lost"].values())
            result["misuse"] = found
            print(*(f"{name}: {value}" for name, value in found.items()), sep="\n")
        left = asyncio.run(metrics(url))["msdd_fast_queue_images"]
        faults += int(left)
        print(f"images left in the queue: {left:g}")
    print(f"the server ended with {process.returncode}")
    if args.json:
        write_json(args.json, result)
    return 1 if faults or process.returncode else 0


if __name__ == "__main__":
    sys.exit(run_program(main))
