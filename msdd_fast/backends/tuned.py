"""Which backend measured fastest: one table, shipped in backends/fastest.json, and one lookup.

    {"machine": {"op": {"dtype": {"size": {"rows": "backend"}}}}}

The size of attention is its head size and its rows are queries; the size of linear is "in x out" ("256x768").

``msdd-fast tune`` measures the entry of its machine. What the file of MSDD_FAST_TUNED says of a machine replaces what
is shipped about it. Without an entry there is no preference, and the op takes its first backend that can run.
"""

from __future__ import annotations

import functools
import json
import os
import re
from pathlib import Path
from typing import Any

import torch

from msdd_fast.backends._constant import constant_when_compiled
from msdd_fast.backends.extension import cpu_level, extension_status
from msdd_fast.errors import InputError

_LEVEL = {"attention": "attention_level", "linear": "linear_level"}
SHIPPED = Path(__file__).resolve().with_name("fastest.json")


def fastest(op: str, device: torch.device, dtype: torch.dtype, size: int | str, rows: int) -> str | None:
    """Backend of the smallest measured number of rows that is at least this one, else of the largest; or None."""
    name = None
    for measured_size, limit, backend in _measured(op, str(device), str(dtype).removeprefix("torch.")):
        if measured_size == size and (name is None or rows <= limit):
            name = backend
    return name


def measured(op: str, device: torch.device, dtype: torch.dtype, size: int | str) -> set[str]:
    """Every backend that is the fastest for some number of rows."""
    found = _measured(op, str(device), str(dtype).removeprefix("torch."))
    return {backend for measured_size, _, backend in found if measured_size == size}


def machine(device: str, op: str = "attention") -> str:
    """What the table knows a device by: "cpu-avx2" (the extension's level), "cuda-sm90"; else the bare type.

    linear has a level that attention has not, AMX.
    """
    kind = torch.device(device).type
    if kind == "cpu":
        return f"cpu-{cpu_level(_LEVEL[op])}" if extension_status()[0] and op in _LEVEL else kind
    if kind == "cuda" and torch.version.hip is None and torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability(device)
        return f"cuda-sm{major}{minor}"
    return kind


def read_table(path: Path) -> dict[str, Any]:
    """The table in a file. Raises InputError if it cannot be read or is none."""
    remedy = f"write it with: msdd-fast tune --out {path}"
    try:
        table = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as e:
        raise InputError(f"MSDD_FAST_TUNED: {path} cannot be read ({e}); {remedy}") from e
    if not _is_table(table, 5):
        raise InputError(f"MSDD_FAST_TUNED: {path} must hold a table of machines; {remedy}")
    return table


# The keys of the two lower levels: sizes and rows.
_KEYS = {1: re.compile(r"\d{1,9}"), 2: re.compile(r"\d{1,9}(x\d{1,9})?")}


def _is_table(entry: Any, levels: int) -> bool:
    """Whether ``entry`` is dicts of so many levels around names of backends."""
    if levels == 0:
        return isinstance(entry, str)
    pattern = _KEYS.get(levels)
    return isinstance(entry, dict) and all(
        (pattern is None or pattern.fullmatch(key)) and _is_table(value, levels - 1) for key, value in entry.items()
    )


@functools.cache
def _table() -> dict[str, Any]:
    named = os.environ.get("MSDD_FAST_TUNED")
    return {**read_table(SHIPPED), **(read_table(Path(named)) if named else {})}


@functools.cache
def _rows(op: str, device: str, dtype: str) -> tuple[tuple[int | str, int, str], ...]:
    """(size, rows, backend), the most rows first."""
    sizes = _table().get(machine(device, op), {}).get(op, {}).get(dtype, {})
    rows = [(_size(size), int(count), name) for size, row in sizes.items() for count, name in row.items()]
    return tuple(sorted(rows, reverse=True))


def _size(key: str) -> int | str:
    return int(key) if key.isdecimal() else key


@constant_when_compiled
def _measured(op: str, device: str, dtype: str) -> tuple[tuple[int | str, int, str], ...]:
    return _rows(op, device, dtype)
