"""euler_step: one step along the velocity (paper Eq. 5; dt < 0, since levels fall).

    out = x + dt * v

x and v any shape (the same), each float32, bfloat16 or float16; out has x's dtype and memory order, computed in
float32 and rounded once. Moves 3 elements per element: two reads, one write. The eager reference is differentiable.
"""

from __future__ import annotations

import torch
from torch import Tensor

from msdd_fast.backends.cpu import can_use_cpu
from msdd_fast.backends.triton import can_use_triton
from msdd_fast.ops._checks import as_rows, as_scalar, check_float, check_like, dense
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

    return launch(*as_rows(x, v), dt)


def _cpu(x: Tensor, v: Tensor, dt: Tensor) -> Tensor:
    from msdd_fast import native

    x, v = as_rows(x, v)
    return native.cfg_euler(x, v, None, None, dt)


OP = Op(
    "euler_step",
    "(Tensor x, Tensor v, Tensor dt) -> Tensor",
    euler_step_eager,
    lambda x, *_: torch.empty_like(dense(x)),
)
OP.register("cpu", _cpu, lambda x, *_: can_use_cpu(x))
OP.register("triton", _triton, lambda x, *_: can_use_triton(x))
