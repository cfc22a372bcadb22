"""What a command says: to a person, as JSON, and how far it is."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

from msdd_fast.io.files import is_standard_output, require_writable
from msdd_fast.io.json_files import write_json

if TYPE_CHECKING:
    from tqdm import tqdm

DELAY = 2.0
"""Seconds before a progress bar of many items appears."""


def add_json(parser: argparse._ActionsContainer, content: str) -> None:
    parser.add_argument("--json", metavar="FILE", help=f"also write {content} as JSON; - is standard output")


def check_json(args: argparse.Namespace) -> None:
    """Raise InputError, before the work, if the file of --json cannot be written."""
    if args.json:
        require_writable(args.json)


def say(args: argparse.Namespace, *lines: str) -> None:
    """Print for a person: not with --quiet, and on stderr if a result goes to standard output."""
    if not getattr(args, "quiet", False):
        taken = any(is_standard_output(path) for name in ("json", "out") if (path := getattr(args, name, None)))
        print(*lines, sep="\n", file=sys.stderr if taken else sys.stdout, flush=True)


def finish(args: argparse.Namespace, result: dict[str, Any]) -> None:
    """Write the result where --json asks for it."""
    if args.json:
        write_json(args.json, result)


def bar(args: argparse.Namespace, total: int, unit: str = "img", delay: float | None = None) -> tqdm[NoReturn]:
    """A progress bar on stderr, if it takes longer than ``delay`` (2 s): on a terminal only, and not with --quiet."""
    from tqdm import tqdm

    off = True if getattr(args, "quiet", False) else None  # None: tqdm looks whether stderr is a terminal
    return tqdm(total=total, unit=unit, disable=off, delay=DELAY if delay is None else delay, leave=False)


class Steps:
    """The steps of a slow command, as a progress bar that has the name of the current one from its beginning."""

    def __init__(self, shown: tqdm[NoReturn]) -> None:
        self._shown, self._begun = shown, 0

    def __call__(self, name: str) -> None:
        """A step begins, and with it the one before has ended."""
        self._shown.update(min(self._begun, 1))
        self._begun += 1
        self._shown.set_description_str(name)


@contextmanager
def steps(args: argparse.Namespace, count: int) -> Iterator[Steps]:
    with bar(args, count, "step", 0) as shown:
        yield Steps(shown)
