"""sigma_gate: features added through a gate that depends on their noise level, then RMSNorm and adaLN.

    logit = x . weight, one value per row,   or ``logit`` as it is given
    x_new = x + sigmoid(logit + offset) * y
    h     = rms_weight * (x_new / sqrt(mean(x_new^2) + eps)) * (1 + scale) + shift

x and y (*, D), R rows. ``offset`` (*, 1) or (*, D) is what does not change with x: in PiD the features' half of the
logit, its bias, and -exp(log_alpha) * sigma. Either ``weight`` (D,), for a gate per row, or ``logit`` (*, 1) or (*, D).
shift and scale (G, D) are spread over the rows as in norm_modulate, rms_weight is (D,). Without these three there is no
norm, and h has no elements.

All float32, bfloat16 or float16 (eager: any float dtype). x_new and h have x's shape and dtype and are contiguous; h
comes from x_new as rounded to that dtype. Kernels compute in float32, logit and gate too, and take D up to 8192. Moves
4 R D elements (x, y, x_new, h) and the logits. Eager is differentiable.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from msdd_fast.backends.choice import Verdict
from msdd_fast.backends.triton import TRITON
from msdd_fast.errors import InputError
from msdd_fast.layout import rows_per_entry
from msdd_fast.native._call import in_order
from msdd_fast.ops._adaln import check_adaln, check_rms_weight, kernels_fit
from msdd_fast.ops._checks import check_device, check_eps, check_floating
from msdd_fast.ops._example import normals
from msdd_fast.ops._native import register_native
from msdd_fast.ops._registry import Op
from msdd_fast.ops.norm_modulate import NORM_EPS, norm_modulate_eager


def sigma_gate(
    x: Tensor,
    y: Tensor,
    offset: Tensor,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    rms_weight: Tensor | None = None,
    logit: Tensor | None = None,
    weight: Tensor | None = None,
    eps: float = NORM_EPS,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """(x_new, h); see the module. Raises InputError for sizes that do not fit together."""
    check_floating("x", x)
    if x.ndim < 1 or x.shape[-1] < 1:
        raise InputError(f"x must be (*, D) with D at least 1, got {tuple(x.shape)}")
    check_floating("y", y)
    if y.shape != x.shape:
        raise InputError(f"y must have the shape of x, {tuple(x.shape)}, got {tuple(y.shape)}")
    check_device("y", y, "x", x)
    if (logit is None) == (weight is None):
        raise InputError("pass either logit or weight")
    for name, t in (("offset", offset), *(() if logit is None else (("logit", logit),))):
        check_floating(name, t)
        if t.shape[:-1] != x.shape[:-1] or t.ndim != x.ndim or t.shape[-1] not in (1, x.shape[-1]):
            expected = f"{(*x.shape[:-1], 1)} or {tuple(x.shape)}"
            raise InputError(f"{name} must be {expected}, got {tuple(t.shape)}")
        check_device(name, t, "x", x)
    if weight is not None:
        check_floating("weight", weight)
        if weight.shape != x.shape[-1:]:
            raise InputError(f"weight must be ({x.shape[-1]},), got {tuple(weight.shape)}")
        check_device("weight", weight, "x", x)
    given = [t is not None for t in (shift, scale, rms_weight)]
    if any(given) != all(given):
        raise InputError("shift, scale and rms_weight must be given together, or none of them")
    if shift is not None and scale is not None and rms_weight is not None:
        check_adaln(x, None, shift=shift, scale=scale)
        check_rms_weight(rms_weight, x, None)
    out: tuple[Tensor, Tensor] = OP(
        x, y, offset, shift, scale, rms_weight, logit, weight, check_eps(eps), backend=backend
    )
    return out


def sigma_gate_eager(
    x: Tensor,
    y: Tensor,
    offset: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    rms_weight: Tensor | None,
    logit: Tensor | None,
    weight: Tensor | None,
    eps: float = NORM_EPS,
) -> tuple[Tensor, Tensor]:
    """Reference: plain torch, rounded after every operation as the dtype has it."""
    if weight is not None:
        logit = (x * weight).sum(-1, keepdim=True)
    assert logit is not None
    x_new = (x + torch.sigmoid(logit + offset) * y).to(x.dtype).contiguous()
    if shift is None or scale is None:
        return x_new, x.new_empty(0)
    return x_new, norm_modulate_eager(x_new, shift, scale, None, eps, rms_weight)


def _fake(x: Tensor, y: Tensor, offset: Tensor, shift: Tensor | None, *_: Any) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    return out, x.new_empty(0) if shift is None else torch.empty_like(out)


def _contiguous(
    x: Tensor,
    y: Tensor,
    offset: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    rms_weight: Tensor | None,
    logit: Tensor | None,
    weight: Tensor | None,
    eps: float = NORM_EPS,
) -> tuple[Any, ...]:
    """The arguments as the kernels read them."""
    run = 1
    if shift is not None and scale is not None:
        (shift, scale), run = rows_per_entry([shift, scale], x.shape[:-1].numel(), None)
    rms_weight, weight = (None if t is None else t.contiguous() for t in (rms_weight, weight))
    logit = None if logit is None else logit.contiguous()
    return x.contiguous(), y.contiguous(), offset.contiguous(), shift, scale, rms_weight, logit, weight, run, eps


def _triton(*args: Any) -> tuple[Tensor, Tensor]:
    from msdd_fast.kernels.sigma_gate import sigma_gate as launch

    return launch(*_contiguous(*args))


def _kernels_fit(*args: Any) -> Verdict:
    return kernels_fit(*args[:8])


def _example() -> tuple[Any, ...]:
    x, y, offset, tables, rms_weight, weight = normals((2, 3, 24), (2, 3, 24), (2, 3, 1), (2, 48), (24,), (24,))
    return x, y, offset, *tables.split(24, 1), rms_weight, None, weight


OP = Op(
    "sigma_gate",
    "(Tensor x, Tensor y, Tensor offset, Tensor? shift, Tensor? scale, Tensor? rms_weight, Tensor? logit, "
    "Tensor? weight, float eps=1e-6) -> (Tensor, Tensor)",
    sigma_gate_eager,
    _fake,
    _example,
)
native_sigma_gate = in_order(
    "sigma_gate", ("x", "y", "offset", "shift", "scale", "rms_weight", "logit", "weight"), _fake
)
register_native(OP, native_sigma_gate, _contiguous, _kernels_fit)
OP.register(TRITON, _triton, _kernels_fit)
