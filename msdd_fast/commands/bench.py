"""Measure img/s for each scale and the whole decode, latencies and cold start, and find regressions.

Every provider is checked against the eager model in float32, then all are timed in turns; numbers are medians. Exit
code 1 if --compare finds a slower case (docs/benchmarks.md has the thresholds).
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msdd_fast.commands.common import pick_device, positive_int
from msdd_fast.errors import RegressionError
from msdd_fast.io.files import atomic_write, require_writable

if TYPE_CHECKING:
    from msdd_fast.bench.decode.cases import DecodeCase
    from msdd_fast.bench.decode.regressions import Verdict


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what to measure")
    what.add_argument("--suite", choices=("standard", "full"), default="standard", help="default: %(default)s")
    what.add_argument("--gate", action="store_true", help="a subset that takes at most a minute")
    what.add_argument("--model", nargs="+", help="checkpoints or presets (random weights) instead of a suite")
    what.add_argument("--batch", type=positive_int, nargs="+", default=[1], help="with --model (default: 1)")
    what.add_argument("--steps", type=positive_int, default=1, help="with --model (default: 1)")
    what.add_argument("--cfg-scale", type=float, default=1.0, help="with --model (default: 1)")
    what.add_argument("--kind", nargs="+", choices=("decode", "encode"), default=["decode"], help="with --model")
    how = parser.add_argument_group("how")
    how.add_argument("--device", help="torch device (default: cuda if there is one, else cpu)")
    how.add_argument("--rounds", type=positive_int, default=200, help="maximum (default: %(default)s)")
    how.add_argument("--seconds", type=float, help="timing budget of each provider of a case, preparation not included")
    how.add_argument("--compile-seconds", type=float, metavar="N", help="time limit of torch.compile's first call")
    how.add_argument("--no-compile", action="store_true", help="do not measure torch.compile")
    how.add_argument("--no-cold-start", action="store_true", help="do not measure the cold start")
    out = parser.add_argument_group("output")
    out.add_argument("--json", metavar="FILE", help="store the run")
    out.add_argument("--html", metavar="FILE", help="write a report as one self-contained page")
    out.add_argument("--from", dest="source", metavar="FILE", help="measure nothing and use this stored run")
    out.add_argument(
        "--compare",
        metavar="BASE",
        help="a stored run of this device, or a git revision, which is built and measured in turns with this tree",
    )


def run(args: argparse.Namespace) -> None:
    from msdd_fast.bench.decode import regressions
    from msdd_fast.bench.decode import suite as decode
    from msdd_fast.bench.report import results

    for path in (args.json, args.html):
        if path:
            require_writable(path)
    device = pick_device(args.device)
    base = args.compare
    if base is not None and not Path(base).is_file():
        specs = regressions.GATE if args.gate else regressions.ALL
        _finish(regressions.against_revision(base, device.type, specs, _progress))
        return
    stored = results.read(base) if base is not None else None
    if args.source:
        document = results.read(args.source)
        print("\n".join(line for result in document["cases"] for line in [*results.case_lines(result), ""]))
    else:
        cases = _cases(args)
        document = decode.run_suite(
            cases,
            device,
            args.rounds,
            with_cold_start=not (args.no_cold_start or args.gate),
            waterfall_of=cases[0].model if args.html and cases[0].kind == "decode" else None,
            progress=_print_case,
            note=_progress,
        )
    print("\n".join(results.metadata_lines(document)))
    if args.json:
        results.save(document, args.json)
    if args.html:
        from msdd_fast.bench.report.html import page

        with atomic_write(args.html) as temporary:
            temporary.write_text(page(document, results.history(document)))
    if stored is not None:
        slowdown = regressions.machine_slowdown(stored, document)
        if slowdown > 1:
            print(
                f"this machine is slower now: plain PyTorch takes {slowdown:.2f} times as long as in {base}; "
                "the ratios are relative to that"
            )
        _finish(regressions.against_document(stored, document))


def _cases(args: argparse.Namespace) -> list[DecodeCase]:
    from msdd_fast.bench.decode.cases import SUITES, DecodeCase

    if args.model:
        cases = [
            DecodeCase(model, batch, args.steps, args.cfg_scale, kind)
            for model, batch, kind in itertools.product(args.model, args.batch, args.kind)
        ]
    else:
        cases = SUITES["gate" if args.gate else args.suite]()
    if args.seconds is not None:
        cases = [replace(case, seconds=args.seconds) for case in cases]
    if args.no_compile or args.compile_seconds is not None:
        cases = [replace(case, compile_seconds=0.0 if args.no_compile else args.compile_seconds) for case in cases]
    return cases


def _print_case(result: dict[str, Any]) -> None:
    from msdd_fast.bench.report.results import case_lines

    print("\n".join(case_lines(result)) + "\n", flush=True)


def _progress(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _finish(verdicts: Sequence[Verdict]) -> None:
    """Print the verdicts. Raises RegressionError if a case is slower."""
    from msdd_fast.bench.decode.regressions import lines

    print("\n".join(lines(verdicts)))
    slower = [v.name for v in verdicts if v.slower]
    if slower:
        raise RegressionError(f"{len(slower)} of {len(verdicts)} cases became slower: {'; '.join(slower)}")
