"""JSON files, and JSON lines: one object a line, appended as a run goes on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from msdd_fast.errors import InputError
from msdd_fast.io.files import atomic_write


def write_json(path: Path, content: Any) -> None:
    """Raises OSError."""
    path.write_text(json.dumps(content, indent=2) + "\n")


def append_json_lines(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    """Raises InputError if the file cannot be written."""
    try:
        with open(path, "a") as f:
            f.writelines(json.dumps(line) + "\n" for line in lines)
    except OSError as e:
        raise InputError(f"cannot write {path}: {e.strerror or e}") from e


def keep_json_lines(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Rewrite the file, if there is one, without the lines that ``keep`` rejects and those that a kill cut off."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if keep(json.loads(line)):
                kept.append(line + "\n")
        except ValueError:
            continue
    with atomic_write(path) as temporary:
        temporary.write_text("".join(kept))
