"""cfg_euler: guidance and Euler step in one pass (paper Eq. 4 and 5).

    out = x + dt * (v_uncond + scale * (v_cond - v_uncond))

All of one shape, each float32, bfloat16 or float16; out has x's dtype and memory order, computed in float32 and rounded
once (so it is closer than the two ops one after the other). Moves 4 elements per element. Eager is differentiable.
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


def cfg_euler(
    x: Tensor,
    v_cond: Tensor,
    v_uncond: Tensor,
    scale: float | Tensor,
    dt: float | Tensor,
    *,
    backend: str | None = None,
) -> Tensor:
    """Guided step; ``scale`` and ``dt`` numbers or tensors of one element. Raises InputError for unlike tensors."""
    check_float("x", x)
    check_like("v_cond", v_cond, "x", x)
    check_like("v_uncond", v_uncond, "x", x)
    scale, dt = as_scalar("scale", scale, x.device), as_scalar("dt", dt, x.device)
    out: Tensor = OP(x, v_cond, v_uncond, scale, dt, backend=backend)
    return out


def cfg_euler_eager(x: Tensor, v_cond: Tensor, v_uncond: Tensor, scale: Tensor, dt: Tensor) -> Tensor:
    """Reference: plain torch."""
    v = v_uncond.float() + scale * (v_cond.float() - v_uncond.float())
    return (x.float() + dt * v).to(x.dtype)


def _triton(x: Tensor, v_cond: Tensor, v_uncond: Tensor, scale: Tensor, dt: Tensor) -> Tensor:
    from msdd_fast.kernels.cfg_euler import cfg_euler as launch

    x, v_cond, v_uncond = as_rows(x, v_cond, v_uncond)
    return launch(x, v_cond, v_uncond, scale, dt)


def _native_arguments(
    x: Tensor, v_cond: Tensor, v_uncond: Tensor, scale: Tensor, dt: Tensor
) -> tuple[Tensor | None, ...]:
    return *as_rows(x, v_cond, v_uncond), scale, dt


def _example() -> tuple[Any, ...]:
    return *normals(*[(2, 3, 4, 6)] * 3), torch.tensor(1.5), torch.tensor(0.5)


OP = Op(
    "cfg_euler",
    "(Tensor x, Tensor v_cond, Tensor v_uncond, Tensor scale, Tensor dt) -> Tensor",
    cfg_euler_eager,
    lambda x, *_: torch.empty_like(dense(x)),
    _example,
)
register_native(OP, native.cfg_euler, _native_arguments)
OP.register(TRITON, _triton)
