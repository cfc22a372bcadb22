"""geglu: the activation of SSDD's feed-forward (docs/spec.md#ssdd-network).

    out = value * gelu(gate),        gelu(g) = g (1 + erf(g / sqrt 2)) / 2

The exact GELU, not the one by tanh. value and gate (*, I), of one shape and dtype: float32, bfloat16 or float16 (eager:
any float dtype). Their rows may be apart, so the two halves of one packed (R, 2 I) tensor need no copy. out is
contiguous, of value's dtype; kernels compute in float32, gelu to 3e-7 of the gate, and round once. Moves 3 elements per
element: two reads, one write. Eager is differentiable.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from msdd_fast.backends.choice import Verdict
from msdd_fast.backends.triton import TRITON
from msdd_fast.errors import InputError
from msdd_fast.layout import flat_rows
from msdd_fast.native._call import in_order
from msdd_fast.ops._checks import FLOAT_DTYPES, check_device, check_floating
from msdd_fast.ops._example import normals
from msdd_fast.ops._native import register_native
from msdd_fast.ops._registry import Op


def geglu(value: Tensor, gate: Tensor, *, backend: str | None = None) -> Tensor:
    """value * gelu(gate). Raises InputError if gate is not like value."""
    check_floating("value", value)
    check_floating("gate", gate)
    if value.ndim < 1 or gate.shape != value.shape or gate.dtype != value.dtype:
        expected = f"the shape (*, I) and dtype of value, {tuple(value.shape)} {value.dtype}"
        raise InputError(f"gate must have {expected}, got {tuple(gate.shape)} {gate.dtype}")
    check_device("gate", gate, "value", value)
    out: Tensor = OP(value, gate, backend=backend)
    return out


def geglu_eager(value: Tensor, gate: Tensor) -> Tensor:
    """Reference: plain torch, rounded after every operation as the dtype has it."""
    return (value * F.gelu(gate)).contiguous()


def _triton(value: Tensor, gate: Tensor) -> Tensor:
    from msdd_fast.kernels.geglu import geglu as launch

    return launch(flat_rows(value), flat_rows(gate)).view(value.shape)


def _one_stride(x: Tensor) -> Tensor:
    """``x`` of the same shape with one stride from row to row."""
    rows = flat_rows(x)
    return rows if rows.shape == x.shape else rows.view(x.shape)


def _native_arguments(value: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    return _one_stride(value), _one_stride(gate)


def _kernels_fit(value: Tensor, gate: Tensor) -> Verdict:
    return value.dtype in FLOAT_DTYPES, f"works in float32, bfloat16 and float16, got {value.dtype}"


def _fake(value: Tensor, gate: Tensor) -> Tensor:
    return torch.empty_like(value, memory_format=torch.contiguous_format)


def _example() -> tuple[Any, ...]:
    (both,) = normals((6, 48))
    return both.split(24, 1)


OP = Op("geglu", "(Tensor value, Tensor gate) -> Tensor", geglu_eager, _fake, _example)
register_native(OP, in_order("geglu", ("value", "gate"), _fake), _native_arguments, _kernels_fit)
OP.register(TRITON, _triton, _kernels_fit)
