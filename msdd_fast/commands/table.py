"""A table of reports that `msdd-fast eval --json` wrote, with the papers' rows below, marked as published.

Forms follow the MSDD paper's tables. 1 compares tokenizers: size and tokens. 2 compares scales and steps per scale.
3 is an ablation: guidance as well. Behind them come rFID, PSNR and SSIM, then whatever else was measured. Figures on
other networks than InceptionV3 have columns of their own, and so has img/s in each of the two ways. The conditions of
every row stand below the table. Published numbers are those that this project could read in the papers; --published
adds others.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from msdd_fast.commands.evaluation.published import PUBLISHED
from msdd_fast.commands.evaluation.tables import FORMATS, FORMS
from msdd_fast.errors import InputError
from msdd_fast.io.files import atomic_write, is_standard_output, read_json, require_writable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("reports", nargs="+", metavar="REPORT", help="JSON files of msdd-fast eval")
    parser.add_argument("--form", type=int, choices=sorted(FORMS), default=1, help="of the paper's table (default: 1)")
    parser.add_argument("--format", choices=sorted(FORMATS), default="text", help="(default: %(default)s)")
    parser.add_argument(
        "--published",
        action="append",
        default=[],
        metavar="FILE",
        help="more published rows: a JSON list of objects with name, source and, as in a report, mean",
    )
    parser.add_argument("--no-published", action="store_true", help="our rows only")
    parser.add_argument("-o", "--out", metavar="FILE", default="-", help="(default: standard output)")


def run(args: argparse.Namespace) -> None:
    require_writable(args.out)
    rows = [read_report(path) for path in args.reports]
    if not args.no_published:
        rows += PUBLISHED
    for path in args.published:
        rows += read_published(path)
    content = FORMATS[args.format](args.form, rows)
    if is_standard_output(args.out):
        sys.stdout.write(content)
    else:
        with atomic_write(args.out) as temporary:
            temporary.write_text(content)


def read_report(path: str) -> dict[str, Any]:
    """Raises InputError if the file is no report of ``msdd-fast eval``."""
    report = _read(path)
    if not isinstance(report, dict) or not _is_figures(report.get("mean")):
        raise InputError(f"{path} is not a report of msdd-fast eval: it has no mean")
    _check(path, report)
    # Whatever it says, it is ours: only rows of --published are published.
    return {key: value for key, value in report.items() if key not in ("source", "authors", "images")}


def read_published(path: str) -> list[dict[str, Any]]:
    """Raises InputError if the file is no list of rows."""
    rows = _read(path)
    if not isinstance(rows, list) or not all(
        isinstance(row, dict)
        and all(isinstance(row.get(key), str) and row[key] for key in ("name", "source"))
        and _is_figures(row.get("mean", {}))
        for row in rows
    ):
        raise InputError(f"{path} must be a list of objects with name, source and mean")
    for row in rows:
        _check(path, row)
    return rows


_NUMBERS = ("scales", "steps_per_scale", "image_size", "cfg_scale", "authors", "count")


def _check(path: str, row: dict[str, Any]) -> None:
    for key, value in row.items():
        if value is not None and key in _NUMBERS and not _is_number(value):
            raise InputError(f"{path}: {key} must be a number, got {value!r}")
    shape = row.get("latent_shape")
    if shape is not None and not (isinstance(shape, list) and len(shape) > 1 and all(map(_is_number, shape))):
        raise InputError(f"{path}: latent_shape must be a list of numbers, got {shape!r}")
    ways = row.get("throughput", {})
    if not isinstance(ways, dict) or not all(isinstance(way, dict) for way in ways.values()):
        raise InputError(f"{path}: throughput must hold figures by the way they were measured, got {ways!r}")
    for way in ways.values():
        for name, value in way.items():
            if name.endswith("_per_second") and not _is_number(value):
                raise InputError(f"{path}: {name} must be a number, got {value!r}")


def _read(path: str) -> Any:
    try:
        return read_json(path)
    except FileNotFoundError as e:
        raise InputError(f"{path} does not exist") from e
    except (OSError, ValueError) as e:
        raise InputError(f"{path} is not a JSON file: {e}") from e


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_figures(value: object) -> bool:
    return isinstance(value, dict) and all(map(_is_number, value.values()))
