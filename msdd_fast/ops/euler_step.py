"""euler_step: one step along the velocity (paper Eq. 5; dt < 0, since levels fall).

    out = x + dt * v

x and v any shape (the same), each float32, bfloat16 or float16; out has x's dtype and memory order, computed in
float32 and rounded once. Moves 3 elements per element: two reads, one write. The eager reference is differentiable.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from msdd_fast import native
from msdd_fast.backends.triton import TRITON
from msdd_fast.layout import as_rows, dense
from msdd_fast.ops._checks import as_scalar, check_float, check_like
from msdd_fast.ops._example import normals
from msdd_fast.ops._native import register_native
from msdd_fast.ops._registry import Op


def euler_step(x: Tensor, v: Tensor, dt: float | Tensor, *, backend: str | None = None) -> Tensor:
    """x + dt * v; ``dt`` a number or a tensor of one element on x's device. Raises InputError for unlike tensors."""
    check_float("x", x)
    check_like("v", v, "x", x)
    out: Tensor = OP(x, v, as_scalar("dt", dt, x.device), backend=backend)
    return out


def euler_step_eager(x: Tensor, v: Tensor, dt: Tensor) -> Tensor:
    """Reference: plain torch."""
    return (x.float() + dt * v.float()).to(x.dtype)


def _triton(x: Tensor, v: Tensor, dt: Tensor) -> Tensor:
    from msdd_fast.kernels.euler_step import euler_step as launch

    x, v = as_rows(x, v)
    return launch(x, v, dt)


def _native_arguments(x: Tensor, v: Tensor, dt: Tensor) -> tuple[Tensor | None, ...]:
    x, v = as_rows(x, v)
    return x, v, None, None, dt


def _example() -> tuple[Any, ...]:
    return *normals((2, 3, 4, 6), (2, 3, 4, 6)), torch.tensor(0.5)


OP = Op(
    "euler_step",
    "(Tensor x, Tensor v, Tensor dt) -> Tensor",
    euler_step_eager,
    lambda x, *_: torch.empty_like(dense(x)),
    _example,
)
register_native(OP, native.cfg_euler, _native_arguments)
OP.register(TRITON, _triton)
