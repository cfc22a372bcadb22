"""JSON files of the benchmarks, read with an error that names the file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from msdd_fast.errors import InputError
from msdd_fast.io import files


def read_json(path: str | Path, what: str) -> Any:
    """Raises InputError, which says that ``path`` must be ``what``, for a file that is missing or not JSON."""
    try:
        return files.read_json(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} must be {what}: {error}") from error


@contextmanager
def taken_for(path: str | Path, what: str) -> Iterator[None]:
    """Raises InputError, which says that ``path`` must be ``what``, if the block misses something in its content."""
    try:
        yield
    except (LookupError, TypeError, AttributeError) as error:
        raise InputError(f"{path} must be {what}: it has no {error}") from error
