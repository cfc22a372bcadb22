"""gate_residual_norm_modulate: a block's gated residual, the LayerNorm and the adaLN that follow (docs/spec.md#adaln).

    x_new = x + gate * y,        h = norm_modulate(x_new, shift, scale)

x and y (*, D), R rows; gate, shift and scale (G, D) are spread over the rows as in norm_modulate, ``split`` too. All
float32, bfloat16 or float16 (eager: any float dtype). x_new and h have x's shape and dtype and are contiguous; h comes
from x_new as rounded to that dtype, so that it is what norm_modulate would make of x_new. Moves 4 R D elements (x, y,
x_new, h) and, once each, the tables: one pass where the two steps apart take 5 R D. Eager is differentiable.
"""

from __future__ import annotations

import torch
from torch import Tensor

from msdd_fast.backends.cpu import can_use_cpu
from msdd_fast.backends.triton import can_use_triton
from msdd_fast.errors import InputError
from msdd_fast.ops._adaln import can_use_adaln, check_adaln, runs, spread
from msdd_fast.ops._checks import check_device, check_floating
from msdd_fast.ops._registry import Op, both
from msdd_fast.ops.norm_modulate import NORM_EPS, norm_modulate_eager


def gate_residual_norm_modulate(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    split: int | None = None,
    eps: float = NORM_EPS,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """(x_new, h); see the module. Raises InputError for sizes that do not fit together."""
    check_adaln(x, split, gate=gate, shift=shift, scale=scale)
    check_floating("y", y)
    if y.shape != x.shape:
        raise InputError(f"y must have the shape of x, {tuple(x.shape)}, got {tuple(y.shape)}")
    check_device("y", y, "x", x)
    out: tuple[Tensor, Tensor] = OP(x, y, gate, shift, scale, split, float(eps), backend=backend)
    return out


def gate_residual_norm_modulate_eager(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, split: int | None, eps: float = NORM_EPS
) -> tuple[Tensor, Tensor]:
    """Reference: plain torch, rounded after every operation as the dtype has it."""
    rows = x.shape[:-1].numel()
    gate = spread(gate, rows, split)
    gated = gate * y.reshape(len(gate), rows // max(1, len(gate)), x.shape[-1])
    x_new = (x + gated.reshape(x.shape)).to(x.dtype).contiguous()
    return x_new, norm_modulate_eager(x_new, shift, scale, split, eps)


def _triton(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, split: int | None, eps: float = NORM_EPS
) -> tuple[Tensor, Tensor]:
    from msdd_fast.kernels.gate_residual_norm_modulate import gate_residual_norm_modulate as launch

    (gate, shift, scale), run = runs([gate, shift, scale], x.shape[:-1].numel(), split)
    return launch(x.contiguous(), y.contiguous(), gate, shift, scale, run, eps)


def _cpu(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, split: int | None, eps: float = NORM_EPS
) -> tuple[Tensor, Tensor]:
    from msdd_fast import native

    (gate, shift, scale), run = runs([gate, shift, scale], x.shape[:-1].numel(), split)
    return native.gate_residual_norm_modulate(x.contiguous(), y.contiguous(), gate, shift, scale, run, eps)


def _fake(x: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    return out, torch.empty_like(out)


OP = Op(
    "gate_residual_norm_modulate",
    "(Tensor x, Tensor y, Tensor gate, Tensor shift, Tensor scale, int? split, float eps=1e-6) -> (Tensor, Tensor)",
    gate_residual_norm_modulate_eager,
    _fake,
)
# The C++ first: with TRITON_INTERPRET=1 the other could run on CPU tensors too, very slowly.
OP.register("cpu", _cpu, lambda *args: both(can_use_cpu(args[0]), can_use_adaln(*args[:5])))
OP.register("triton", _triton, lambda *args: both(can_use_triton(args[0]), can_use_adaln(*args[:5])))
