"""JSON files, and JSON lines: one object a line, appended as a run goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from msdd_fast.errors import InputError
from msdd_fast.io.files import atomic_write
from msdd_fast.io.signals import raise_if_received


def write_json(path: str | os.PathLike[str], content: Any, indent: int | None = 2) -> None:
    """Written whole or not at all. Raises InputError if it cannot be."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=indent) + "\n")


def append_json_lines(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    """Raises InputError if the file cannot be written. After Ctrl-C or SIGTERM nothing is, as in ``atomic_write``."""
    raise_if_received()
    try:
        with open(path, "a") as f:
            f.writelines(json.dumps(line) + "\n" for line in lines)
    except OSError as e:
        raise InputError(f"cannot write {path}: {e.strerror or e}") from e


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The mappings in the file, empty if there is none. Lines that hold no mapping are left out."""
    return [value for _, value in _lines(path) if isinstance(value, dict)]


def keep_json_lines(path: Path, keep: Callable[[dict[str, Any]], bool]) -> int:
    """Rewrite the file, if there is one, without the mappings that ``keep`` rejects and without other lines.

    Returns how many whole lines held no mapping; a last line that a kill cut off is not counted.
    """
    lines = _lines(path)
    kept = [line for line, value in lines if isinstance(value, dict) and keep(value)]
    if len(kept) < len(lines):
        with atomic_write(path) as temporary:
            temporary.write_bytes(b"".join(kept))
    return sum(line.endswith(b"\n") and not isinstance(value, dict) for line, value in lines)


def _lines(path: Path) -> list[tuple[bytes, Any]]:
    """Every line and what it holds, None if it is not JSON or is cut off."""
    if not path.exists():
        return []
    lines: list[tuple[bytes, Any]] = []
    with open(path, "rb") as f:
        for line in f:
            try:
                lines.append((line, json.loads(line) if line.endswith(b"\n") else None))
            except (ValueError, RecursionError):
                lines.append((line, None))
    return lines
