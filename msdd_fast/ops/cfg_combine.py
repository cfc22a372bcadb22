"""cfg_combine: classifier-free guidance (docs/spec.md#cfg; paper Eq. 4).

    out = v_uncond + scale * (v_cond - v_uncond)

Both velocities of one shape, each float32, bfloat16 or float16; out has the dtype and memory order of v_cond, computed
in float32 and rounded once. Moves 3 elements per element. The eager reference is differentiable.
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


def cfg_combine(v_cond: Tensor, v_uncond: Tensor, scale: float | Tensor, *, backend: str | None = None) -> Tensor:
    """Guided velocity; ``scale`` a number or a tensor of one element. Raises InputError for unlike tensors."""
    check_float("v_cond", v_cond)
    check_like("v_uncond", v_uncond, "v_cond", v_cond)
    out: Tensor = OP(v_cond, v_uncond, as_scalar("scale", scale, v_cond.device), backend=backend)
    return out


def cfg_combine_eager(v_cond: Tensor, v_uncond: Tensor, scale: Tensor) -> Tensor:
    """Reference: plain torch."""
    return (v_uncond.float() + scale * (v_cond.float() - v_uncond.float())).to(v_cond.dtype)


def _triton(v_cond: Tensor, v_uncond: Tensor, scale: Tensor) -> Tensor:
    from msdd_fast.kernels.cfg_combine import cfg_combine as launch

    v_cond, v_uncond = as_rows(v_cond, v_uncond)
    return launch(v_cond, v_uncond, scale)


def _native_arguments(v_cond: Tensor, v_uncond: Tensor, scale: Tensor) -> tuple[Tensor | None, ...]:
    v_cond, v_uncond = as_rows(v_cond, v_uncond)
    return None, v_cond, v_uncond, scale, None


def _example() -> tuple[Any, ...]:
    return *normals((2, 3, 4, 6), (2, 3, 4, 6)), torch.tensor(1.5)


OP = Op(
    "cfg_combine",
    "(Tensor v_cond, Tensor v_uncond, Tensor scale) -> Tensor",
    cfg_combine_eager,
    lambda v, *_: torch.empty_like(dense(v)),
    _example,
)
register_native(OP, native.cfg_euler, _native_arguments)
OP.register(TRITON, _triton)
