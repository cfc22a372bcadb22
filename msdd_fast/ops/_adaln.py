"""What the two adaLN ops share: their arguments, which row of a table a row of x takes, and what kernels need."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from msdd_fast.errors import InputError
from msdd_fast.ops._checks import FLOAT_DTYPES, check_device, check_floating

MAX_WIDTH = 8192  # one program, or one thread's stack, holds a row; as in csrc/include/msdd_fast/norm_modulate.h


def check_adaln(x: Tensor, split: int | None, **tables: Tensor) -> None:
    """x (*, D) and its tables (G, D), each of any float dtype; rows that ``split`` or G can share out."""
    check_floating("x", x)
    if x.ndim < 1 or x.shape[-1] < 1:
        raise InputError(f"x must be (*, D) with D at least 1, got {tuple(x.shape)}")
    width, rows = x.shape[-1], x.shape[:-1].numel()
    first, groups = "", 0
    for name, table in tables.items():
        check_floating(name, table)
        expected = f"({groups if first else 'groups'}, {width})"
        if table.ndim != 2 or table.shape[-1] != width or (first and len(table) != groups):
            raise InputError(f"{name} must be {expected}, got {tuple(table.shape)}")
        check_device(name, table, "x", x)
        first, groups = first or name, len(table)
    if split is None:
        if rows and (groups == 0 or rows % groups):
            raise InputError(f"{first} must have a number of rows that divides the {rows} of x, got {groups}")
        return
    check_split(split, rows, "rows")
    if groups != 2:
        raise InputError(f"{first} must have 2 rows where split is given, got {groups}")


def check_split(split: int, limit: int, what: str) -> None:
    if not isinstance(split, int) or isinstance(split, bool) or not 0 <= split <= limit:
        raise InputError(f"split must be an int in [0, {limit}], the number of {what}, got {split!r}")


def can_use_adaln(x: Tensor, *others: Tensor) -> tuple[bool, str]:
    """Limits of the kernels."""
    for t in (x, *others):
        if t.dtype not in FLOAT_DTYPES:
            return False, f"works in float32, bfloat16 and float16, got {t.dtype}"
    if x.shape[-1] > MAX_WIDTH:
        return False, f"works on rows of at most {MAX_WIDTH} elements, got {x.shape[-1]}"
    return True, ""


def spread(table: Tensor, rows: int, split: int | None) -> Tensor:
    """(G, 1, D), to be broadcast over x as (G, rows / G, D); with ``split`` a row for each of x: (rows, 1, D)."""
    if split is not None:
        table = table.repeat_interleave(table.new_tensor([split, rows - split]).long(), dim=0, output_size=rows)
    return table[:, None]


def runs(tables: Sequence[Tensor], rows: int, split: int | None) -> tuple[list[Tensor], int]:
    """Tables with adjacent elements, and ``run``: row r of x takes row min(r // run, G - 1)."""
    if split == 0:
        tables, split = [t[1:] for t in tables], None
    run = rows // max(1, len(tables[0])) if split is None else split
    return [t if t.stride(-1) == 1 else t.contiguous() for t in tables], max(1, run)
