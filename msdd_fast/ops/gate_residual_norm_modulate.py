"""gate_residual_norm_modulate: a block's gated residual, the norm and the adaLN that follow (docs/spec.md#adaln).

    x_new = x + gate * y,        h = norm_modulate(x_new, shift, scale), with ``rms_weight`` if that is given

x and y (*, D), R rows; gate, shift and scale (G, D) are spread over the rows as in norm_modulate, ``split`` and
rms_weight too. All float32, bfloat16 or float16 (eager: any float dtype). x_new and h have x's shape and dtype and are
contiguous; h comes from x_new as rounded to that dtype, so that it is what norm_modulate would make of x_new. Moves
4 R D elements (x, y, x_new, h) and, once each, the tables: one pass where the two steps apart take 5 R D. Eager is
differentiable.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from msdd_fast import native
from msdd_fast.backends.choice import Verdict
from msdd_fast.backends.triton import TRITON
from msdd_fast.errors import InputError
from msdd_fast.layout import expand_rows, rows_per_entry
from msdd_fast.ops._adaln import check_adaln, check_rms_weight, kernels_fit
from msdd_fast.ops._checks import check_device, check_eps, check_floating
from msdd_fast.ops._example import normals
from msdd_fast.ops._native import register_native
from msdd_fast.ops._registry import Op
from msdd_fast.ops.norm_modulate import NORM_EPS, contiguous_rms_weight, norm_modulate_eager


def gate_residual_norm_modulate(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    split: int | None = None,
    eps: float = NORM_EPS,
    rms_weight: Tensor | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """(x_new, h); see the module. Raises InputError for sizes that do not fit together."""
    check_adaln(x, split, gate=gate, shift=shift, scale=scale)
    check_floating("y", y)
    if y.shape != x.shape:
        raise InputError(f"y must have the shape of x, {tuple(x.shape)}, got {tuple(y.shape)}")
    check_device("y", y, "x", x)
    if rms_weight is not None:
        check_rms_weight(rms_weight, x, split)
    out: tuple[Tensor, Tensor] = OP(x, y, gate, shift, scale, split, check_eps(eps), rms_weight, backend=backend)
    return out


def gate_residual_norm_modulate_eager(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    split: int | None,
    eps: float = NORM_EPS,
    rms_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Reference: plain torch, rounded after every operation as the dtype has it."""
    rows = x.shape[:-1].numel()
    gate = expand_rows(gate, rows, split)
    gated = gate * y.reshape(len(gate), rows // max(1, len(gate)), x.shape[-1])
    x_new = (x + gated.reshape(x.shape)).to(x.dtype).contiguous()
    return x_new, norm_modulate_eager(x_new, shift, scale, split, eps, rms_weight)


def _contiguous(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    split: int | None,
    eps: float = NORM_EPS,
    rms_weight: Tensor | None = None,
) -> tuple[Any, ...]:
    """The arguments as the kernels read them."""
    (gate, shift, scale), run = rows_per_entry([gate, shift, scale], x.shape[:-1].numel(), split)
    weight = contiguous_rms_weight(rms_weight, split)
    return x.contiguous(), y.contiguous(), gate, shift, scale, run, eps, weight


def _triton(*args: Any) -> tuple[Tensor, Tensor]:
    from msdd_fast.kernels.gate_residual_norm_modulate import gate_residual_norm_modulate as launch

    return launch(*_contiguous(*args))


def _fake(x: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    return out, torch.empty_like(out)


def _kernels_fit(*args: Any) -> Verdict:
    return kernels_fit(*args[:5], *args[7:])


def _example() -> tuple[Any, ...]:
    x, y, tables = normals((2, 3, 24), (2, 3, 24), (2, 72))
    return x, y, *tables.split(24, 1), None


OP = Op(
    "gate_residual_norm_modulate",
    "(Tensor x, Tensor y, Tensor gate, Tensor shift, Tensor scale, int? split, float eps=1e-6, Tensor? rms_weight=None)"
    " -> (Tensor, Tensor)",
    gate_residual_norm_modulate_eager,
    _fake,
    _example,
)
register_native(OP, native.gate_residual_norm_modulate, _contiguous, _kernels_fit)
OP.register(TRITON, _triton, _kernels_fit)
