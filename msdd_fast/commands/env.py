"""Say what this installation and machine offer, and whether everything that could be fast here is."""

from __future__ import annotations

import argparse
from typing import Any

from msdd_fast import __version__
from msdd_fast.errors import BackendUnavailableError
from msdd_fast.io.json_files import write_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", metavar="FILE", nargs="?", const="-", help="write it as JSON; alone, or -, to stdout")
    parser.add_argument("--check", action="store_true", help="exit with 1 if something is missing")


def run(args: argparse.Namespace) -> None:
    from msdd_fast.backends.environment import collect_env, shortcomings

    missing = shortcomings()
    report = {"msdd_fast": __version__, **collect_env(), "missing": missing}
    if args.json:
        write_json(args.json, report)
    elif not getattr(args, "quiet", False):
        print("\n".join(_lines({name: value for name, value in report.items() if name != "missing"})))
        print("\nverdict: " + ("; ".join(missing) if missing else "everything that this machine can use is there"))
    if args.check and missing:
        raise BackendUnavailableError("; ".join(missing))


def _lines(report: dict[str, Any], indent: str = "") -> list[str]:
    lines = []
    for name, value in report.items():
        if isinstance(value, dict):
            lines += [f"{indent}{name}:", *_lines(value, indent + "  ")]
        else:
            lines.append(f"{indent}{name}: {'not installed' if value is None else value}")
    return lines
