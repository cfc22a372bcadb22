"""Report versions, the compiled extension, CPU and devices; also the way to verify an installation."""

from __future__ import annotations

import argparse
import json
from typing import Any

from msdd_fast import __version__
from msdd_fast.backends.environment import collect_env


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="machine-readable")


def run(args: argparse.Namespace) -> None:
    report = {"msdd_fast": __version__, **collect_env()}
    print(json.dumps(report, indent=2) if args.json else "\n".join(_lines(report)))


def _lines(report: dict[str, Any], indent: str = "") -> list[str]:
    lines = []
    for name, value in report.items():
        if isinstance(value, dict):
            lines += [f"{indent}{name}:", *_lines(value, indent + "  ")]
        else:
            lines.append(f"{indent}{name}: {'not installed' if value is None else value}")
    return lines
