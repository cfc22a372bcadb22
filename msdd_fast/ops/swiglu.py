"""swiglu: the activation of the MLP (docs/spec.md#swiglu).

    out = silu(a) * b,        silu(a) = a / (1 + e^-a)

a and b (*, I), of one shape and dtype: float32, bfloat16 or float16 (eager: any float dtype). Their rows may be apart,
so the two halves of one packed (R, 2 I) tensor need no copy. out is contiguous, of a's dtype; kernels compute in
float32 and round once. Moves 3 elements per element: two reads, one write. Eager is differentiable.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from msdd_fast import native
from msdd_fast.backends.choice import Verdict
from msdd_fast.backends.triton import TRITON
from msdd_fast.errors import InputError
from msdd_fast.layout import flat_rows
from msdd_fast.ops._checks import FLOAT_DTYPES, check_device, check_floating
from msdd_fast.ops._example import normals
from msdd_fast.ops._native import register_native
from msdd_fast.ops._registry import Op


def swiglu(a: Tensor, b: Tensor, *, backend: str | None = None) -> Tensor:
    """silu(a) * b. Raises InputError if b is not like a."""
    check_floating("a", a)
    check_floating("b", b)
    if a.ndim < 1 or b.shape != a.shape or b.dtype != a.dtype:
        expected = f"the shape (*, I) and dtype of a, {tuple(a.shape)} {a.dtype}"
        raise InputError(f"b must have {expected}, got {tuple(b.shape)} {b.dtype}")
    check_device("b", b, "a", a)
    out: Tensor = OP(a, b, backend=backend)
    return out


def swiglu_eager(a: Tensor, b: Tensor) -> Tensor:
    """Reference: plain torch, rounded after every operation as the dtype has it."""
    return (F.silu(a) * b).contiguous()


def _triton(a: Tensor, b: Tensor) -> Tensor:
    from msdd_fast.kernels.swiglu import swiglu as launch

    return launch(flat_rows(a), flat_rows(b)).view(a.shape)


def _native_arguments(a: Tensor, b: Tensor) -> tuple[Any, ...]:
    return flat_rows(a), flat_rows(b), tuple(a.shape)


def _kernels_fit(a: Tensor, b: Tensor) -> Verdict:
    return a.dtype in FLOAT_DTYPES, f"works in float32, bfloat16 and float16, got {a.dtype}"


def _example() -> tuple[Any, ...]:
    (both,) = normals((6, 48))
    return both.split(24, 1)


OP = Op(
    "swiglu",
    "(Tensor a, Tensor b) -> Tensor",
    swiglu_eager,
    lambda a, _: torch.empty_like(a, memory_format=torch.contiguous_format),
    _example,
)
register_native(OP, native.swiglu, _native_arguments, _kernels_fit)
OP.register(TRITON, _triton, _kernels_fit)
