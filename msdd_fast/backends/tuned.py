"""Which backend measured fastest: one table, shipped in backends/fastest.json, and one lookup.

    {"machine": {"op": {"dtype": {"head size": {"queries": "backend"}}}}}

``msdd-fast tune`` measures the entry of its machine. What the file of MSDD_FAST_TUNED says of a machine replaces what
is shipped about it. Without an entry there is no preference, and the op takes its first backend that can run.
"""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Any

import torch

from msdd_fast.backends._constant import constant_when_compiled
from msdd_fast.backends.extension import extension_status, load_extension
from msdd_fast.errors import InputError

SHIPPED = Path(__file__).resolve().with_name("fastest.json")


def fastest(op: str, device: torch.device, dtype: torch.dtype, head_size: int, queries: int) -> str | None:
    """Backend of the smallest measured number of queries that is at least this one, else of the largest; or None."""
    name = None
    for size, limit, backend in _measured(op, str(device), str(dtype).removeprefix("torch.")):
        if size == head_size and (name is None or queries <= limit):
            name = backend
    return name


def machine(device: str) -> str:
    """What the table knows a device by: "cpu-avx2" (the extension's level), "cuda-sm90"; else the bare type."""
    kind = torch.device(device).type
    if kind == "cpu":
        return f"cpu-{load_extension().attention_level()}" if extension_status()[0] else kind
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


def _is_table(entry: Any, levels: int) -> bool:
    """Whether ``entry`` is dicts of so many levels around names; keys of the lower two are whole numbers."""
    if levels == 0:
        return isinstance(entry, str)
    return isinstance(entry, dict) and all(
        (levels > 2 or (key.isdecimal() and len(key) < 10)) and _is_table(value, levels - 1)
        for key, value in entry.items()
    )


@functools.cache
def _table() -> dict[str, Any]:
    named = os.environ.get("MSDD_FAST_TUNED")
    return {**read_table(SHIPPED), **(read_table(Path(named)) if named else {})}


@functools.cache
def _rows(op: str, device: str, dtype: str) -> tuple[tuple[int, int, str], ...]:
    """(head size, queries, backend), the most queries first."""
    sizes = _table().get(machine(device), {}).get(op, {}).get(dtype, {})
    rows = [(int(size), int(queries), name) for size, row in sizes.items() for queries, name in row.items()]
    return tuple(sorted(rows, reverse=True))


@constant_when_compiled
def _measured(op: str, device: str, dtype: str) -> tuple[tuple[int, int, str], ...]:
    return _rows(op, device, dtype)
