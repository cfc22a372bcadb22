"""Test the regression gate on this machine: compare this tree with itself, then with a planted slowdown.

    python -m msdd_fast.bench.decode.trial [--times 5] [--plant 0.15] [--json FILE]

Prints every verdict and its time. Exit code 1 if the comparison with itself finds a regression, or if the planted
slowdown is not found in every case.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from msdd_fast.bench.decode.regressions import GATE, between, lines
from msdd_fast.bench.timing.machine import machine_info
from msdd_fast.io.arguments import pick_device, positive_int
from msdd_fast.io.files import require_writable
from msdd_fast.io.json_files import write_json
from msdd_fast.io.program import run_program


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=positive_int, default=5, help="comparisons with itself (default: %(default)s)")
    parser.add_argument("--plant", type=float, default=0.15, help="share of the slowdown (default: %(default)s)")
    parser.add_argument("--device", help="torch device (default: cuda if there is one, else cpu)")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    device = pick_device(args.device).type
    if args.json:
        require_writable(args.json)
    runs: list[dict[str, Any]] = []
    for slowdown in [0.0] * args.times + [args.plant]:
        begin = time.perf_counter()
        verdicts = between(None, GATE, device, slowdown)
        seconds = time.perf_counter() - begin
        good = all(v.slower == (slowdown > 0) for v in verdicts)
        runs.append({"slowdown": slowdown, "seconds": seconds, "good": good, "verdicts": [*map(asdict, verdicts)]})
        what = f"{slowdown:.0%} planted" if slowdown else "against itself"
        print(
            f"{what}, {seconds:.0f} s: {'as expected' if good else 'WRONG'}",
            *lines(verdicts),
            "",
            sep="\n",
            flush=True,
        )
    wrong = sum(not run["good"] for run in runs)
    print(f"{wrong} of {len(runs)} wrong" if wrong else f"all {len(runs)} as expected")
    if args.json:
        write_json(args.json, {"machine": machine_info(), "runs": runs}, indent=1)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(run_program(main))
