"""How evenly a decode runs: percentiles of many calls, and the time to the first image.

    python -m msdd_fast.bench.decode.latency msdd-nano [--batch-size 1] [--decodes 2000] [--json FILE]

"first image" runs from the call of ``accelerate`` to the first images: packing, choosing backends, recording.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from msdd_fast.bench.decode.models import load, random_latents
from msdd_fast.bench.report.text import aligned
from msdd_fast.bench.timing.clock import WallTimer, now
from msdd_fast.bench.timing.harness import Measurement
from msdd_fast.bench.timing.machine import machine_info
from msdd_fast.engine import accelerate
from msdd_fast.io.arguments import positive_int
from msdd_fast.io.files import require_writable
from msdd_fast.io.json_files import write_json
from msdd_fast.io.program import run_program
from msdd_fast.tokenizer import Tokenizer

QUANTILES = (0.5, 0.95, 0.99, 1.0)
WARM_UP = 20


def measure(tokenizer: Tokenizer, batch: int, decodes: int, tier: str = "exact") -> dict[str, Any]:
    """Seconds to the first images, and quantiles of ``decodes`` calls after a warm-up."""
    z = random_latents(tokenizer.config, batch, tokenizer.device)
    begin = now()
    engine = accelerate(tokenizer, batch_sizes=(batch,), tier=tier)
    engine.decode(z).cpu()
    first = now() - begin
    for _ in range(WARM_UP):
        engine.decode(z)
    samples = tuple(WallTimer().seconds(lambda: engine.decode(z), 1) for _ in range(decodes))
    times = Measurement("engine", samples, None)
    return {
        "batch": batch,
        "decodes": decodes,
        "tier": tier,
        "dtype": str(engine.dtype).removeprefix("torch."),
        "graphs": engine.graphs,
        "first_image_s": first,
        "quantiles_s": {str(q): times.quantile(q) for q in QUANTILES},
    }


def table(results: Sequence[dict[str, Any]]) -> str:
    """One line per batch size; "p99 / p50" is what a service promises by."""
    lines = [["batch", "first image ms", "p50 ms", "p95 ms", "p99 ms", "max ms", "p99 / p50"]]
    for r in results:
        q = r["quantiles_s"]
        times = [f"{s * 1e3:.2f}" for s in (r["first_image_s"], *q.values())]
        lines.append([str(r["batch"]), *times, f"{q['0.99'] / q['0.5']:.2f}"])
    return "\n".join(aligned(lines))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--batch-size", type=positive_int, nargs="+", default=[1])
    parser.add_argument("--decodes", type=positive_int, default=2000)
    parser.add_argument("--tier", choices=("exact", "fast"), default="exact")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    if args.json:
        require_writable(args.json)
    tokenizer = load(args.model, torch.device(args.device))
    results = [measure(tokenizer, batch, args.decodes, args.tier) for batch in args.batch_size]
    print(table(results))
    if args.json:
        write_json(args.json, {"model": args.model, "machine": machine_info(), "results": results}, indent=1)


if __name__ == "__main__":
    sys.exit(run_program(main))
