"""Cost of one op call on the CPU: as a user calls it, as an engine calls it, and the C++ function alone.

    python -m msdd_fast.bench.timing.op_overhead [--root OTHER_TREE ...] [--only OP ...] [--json FILE]

The tensors are so small that Python is most of the time. With ``--root``, another tree with a .venv of its own (a
checkout of an older revision) is measured in the same run: one process per tree, in turns, op by op, on the same
tensors (``Op.example`` of this tree), as far as both trees have an op of these arguments. Numbers are
microseconds, the best of ``--rounds`` medians (overhead_worker.py).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from msdd_fast import ops
from msdd_fast.bench.report.text import aligned
from msdd_fast.bench.timing import overhead_worker
from msdd_fast.bench.timing.machine import ROOT, machine_info
from msdd_fast.errors import InputError
from msdd_fast.io.arguments import positive_int
from msdd_fast.io.files import require_writable
from msdd_fast.io.json_files import write_json
from msdd_fast.io.program import run_program
from msdd_fast.ops import get_op

WAYS = ("op", "bound", "C")

Nanoseconds = dict[str, dict[str, float | None]]
"""Op to {"op", "bound", "C"}."""


def examples() -> dict[str, tuple[Any, ...]]:
    """Small arguments of every op that has a C++ function."""
    found = {name: get_op(name) for name in ops.__all__}
    return {name: op.example() for name, op in found.items() if overhead_worker.BACKEND in op.implementations}


class Worker:
    """A process that times ops with the interpreter of one tree, on the arguments in a file."""

    def __init__(self, root: Path, arguments: Path, stack: ExitStack) -> None:
        python = sys.executable if root == ROOT else str(root / ".venv" / "bin" / "python")
        if not Path(python).exists():
            raise InputError(f"--root must be a tree with .venv/bin/python, got {root}")
        self.root = root
        environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET")}
        self.process = subprocess.Popen(
            [python, overhead_worker.__file__, str(arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=root,
            env=environment,
        )
        stack.callback(self._end)

    def ask(self, line: str) -> Any:
        """Raises InputError if the process has died."""
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None and stdout is not None
        try:
            stdin.write(line + "\n")
            stdin.flush()
            return json.loads(stdout.readline())
        except (BrokenPipeError, ValueError) as error:
            raise InputError(f"the process that measures {self.root} died at {line!r}") from error

    def _end(self) -> None:
        self.process.kill()
        self.process.communicate()


def measure(roots: Sequence[Path], rounds: int, only: Sequence[str] = ()) -> dict[str, Nanoseconds]:
    """Nanoseconds by tree, op and way, for the ops that all trees have: the minimum over ``rounds``."""
    with ExitStack() as stack:
        arguments = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "arguments.pt"
        torch.save(examples(), arguments)
        workers = [Worker(root, arguments, stack) for root in roots]
        known = [set(worker.ask("ops")) for worker in workers]
        names = sorted(set.intersection(*known))
        if set(only) - set(names):
            raise InputError(f"--only must name some of {', '.join(names)}, got {', '.join(only)}")
        found: dict[str, Nanoseconds] = {str(root): {} for root in roots}
        for name in only or names:
            samples: dict[str, list[dict[str, float | None]]] = {str(root): [] for root in roots}
            for _ in range(rounds):
                for worker in workers:
                    samples[str(worker.root)].append(worker.ask(f"time {name}"))
            for root, taken in samples.items():
                found[root][name] = {way: _least(s[way] for s in taken) for way in WAYS}
        return found


def _least(values: Iterable[float | None]) -> float | None:
    return min((v for v in values if v is not None), default=None)


def table(found: Mapping[str, Nanoseconds]) -> list[str]:
    """Microseconds per call; "above C++" is what Python adds to the C++ function."""
    lines: list[str] = []
    for root, by_op in found.items():
        rows = [["us per call", "ops.<op>", "above C++", "bound op", "above C++", "C++"]]
        for name, ns in by_op.items():
            c = ns["C"]
            cells = []
            for way in ("op", "bound"):
                value = ns[way]
                cells += [_us(value), _us(None if value is None or c is None else value - c)]
            rows.append([name, *cells, _us(c)])
        lines += [root, *aligned(rows), ""]
    return lines[:-1]


def _us(nanoseconds: float | None) -> str:
    return "-" if nanoseconds is None else f"{nanoseconds / 1e3:.2f}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, nargs="*", default=[], metavar="TREE", help="other trees to measure too")
    parser.add_argument("--only", nargs="*", default=[], metavar="OP")
    parser.add_argument("--rounds", type=positive_int, default=5, help="default: %(default)s")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    if args.json:
        require_writable(args.json)
    found = measure([ROOT, *(root.resolve() for root in args.root)], args.rounds, args.only)
    print("\n".join(table(found)))
    if args.json:
        write_json(args.json, {"machine": machine_info(), "nanoseconds": found}, indent=1)


if __name__ == "__main__":
    sys.exit(run_program(main))
