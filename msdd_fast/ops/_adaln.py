"""What the adaLN ops share: RMSNorm, checks of their arguments and the limits of their kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from msdd_fast.backends.choice import Verdict
from msdd_fast.errors import InputError
from msdd_fast.ops._checks import FLOAT_DTYPES, check_device, check_floating

MAX_WIDTH = 8192  # one program, or one thread's stack, holds a row; as in csrc/include/msdd_fast/norm_modulate.h


def check_adaln(x: Tensor, split: int | None, **tables: Tensor) -> None:
    """Raise InputError unless x is (*, D), tables are (G, D) of any float dtypes and G, or ``split``, fits the rows."""
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


def check_rms_weight(rms_weight: Tensor, x: Tensor, split: int | None) -> None:
    """Raise InputError unless rms_weight is (D,) for x (*, D), or (2, D) with ``split``."""
    check_floating("rms_weight", rms_weight)
    expected = (x.shape[-1],) if split is None else (2, x.shape[-1])
    if rms_weight.shape != expected:
        raise InputError(f"rms_weight must be {expected}, got {tuple(rms_weight.shape)}")
    check_device("rms_weight", rms_weight, "x", x)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight * (x / sqrt(mean(x^2) + eps)) over the last dimension; what the weight multiplies has the dtype of x."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def check_split(split: int, limit: int, what: str) -> None:
    if not isinstance(split, int) or isinstance(split, bool) or not 0 <= split <= limit:
        raise InputError(f"split must be an int in [0, {limit}], the number of {what}, got {split!r}")


def kernels_fit(x: Tensor, *others: Tensor | None) -> Verdict:
    """Whether the kernels' limits hold."""
    for t in (x, *others):
        if t is not None and t.dtype not in FLOAT_DTYPES:
            return False, f"works in float32, bfloat16 and float16, got {t.dtype}"
    if x.shape[-1] > MAX_WIDTH:
        return False, f"works on rows of at most {MAX_WIDTH} elements, got {x.shape[-1]}"
    return True, ""
