"""Is the gate to be trusted on this machine? This tree against itself, and against itself with a slowdown planted.

    python -m msdd_fast.bench.decode.trial [--times 5] [--plant 0.15] [--json FILE]

Prints every verdict and the time that it took. Exit code 1 if a comparison with itself finds a regression, or the
planted slowdown is not found in every case.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from msdd_fast.bench.decode.regressions import GATE, between, lines
from msdd_fast.bench.timing.machine import machine_info


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=5, help="comparisons with itself (default: %(default)s)")
    parser.add_argument("--plant", type=float, default=0.15, help="share of the slowdown (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    runs: list[dict[str, Any]] = []
    for slowdown in [0.0] * args.times + [args.plant]:
        begin = time.perf_counter()
        verdicts = between(None, GATE, args.device, slowdown)
        seconds = time.perf_counter() - begin
        good = all(v.slower == (slowdown > 0) for v in verdicts)
        runs.append({"slowdown": slowdown, "seconds": seconds, "good": good, "verdicts": [*map(asdict, verdicts)]})
        what = f"{slowdown:.0%} planted" if slowdown else "against itself"
        print(
            f"{what}, {seconds:.0f} s: {'as it must be' if good else 'WRONG'}",
            *lines(verdicts),
            "",
            sep="\n",
            flush=True,
        )
    wrong = sum(not run["good"] for run in runs)
    print(f"{wrong} of {len(runs)} wrong" if wrong else f"all {len(runs)} as they must be")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"machine": machine_info(), "runs": runs}, indent=1) + "\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
