"""JSON files of the benchmarks: written whole or not at all, read with an error that names the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from msdd_fast.errors import InputError
from msdd_fast.io import files


def write_json(document: Any, path: str | Path, indent: int | None = 1) -> None:
    """Write ``document`` as JSON; folders are made. ``indent`` None: one line per provider of a bench document."""
    if indent is None:
        text = json.dumps(document, separators=(",", ":")).replace('{"provider"', '\n{"provider"')
    else:
        text = json.dumps(document, indent=indent)
    with files.atomic_write(path) as temporary:
        temporary.write_text(text + "\n")


def read_json(path: str | Path, what: str) -> Any:
    """Raises InputError, which says that ``path`` must be ``what``, for a file that is missing or not JSON."""
    try:
        return files.read_json(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} must be {what}: {error}") from error
