"""linear: rows times a weight matrix, with SwiGLU where two products are one activation (docs/spec.md#swiglu).

    out = x W^T + b                                            (*, out)
    out = silu(x W1^T + b1) * (x W3^T + b3)    with swiglu     (*, out / 2)

x (*, in), weight (out, in), bias (out,) or None, all of one dtype: float32, bfloat16 or float16 (eager: any float
dtype). With ``swiglu`` the weight is [w1; w3] and the bias [b1; b3]. ``packed`` is ``pack_linear(weight, swiglu)``, in
the layout that this machine's kernel reads: weights do not change from call to call, so it is made once. Only cpu
reads it, in place of the weight, and only cpu needs it; without it ``auto`` takes eager.

eager is torch's own product, rounded after every operation as the dtype has it, and is differentiable. cpu sums in
float32 and rounds once, also with ``swiglu``; its bits of a row depend neither on the other rows nor on the number of
threads. R rows move R in + out in + R out elements (with ``swiglu`` R out / 2 at the end) and take 2 R in out FLOP.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from msdd_fast import native
from msdd_fast.backends.choice import Verdict
from msdd_fast.backends.cpu import CPU
from msdd_fast.backends.extension import extension_status
from msdd_fast.diffusion.checks import check_bool
from msdd_fast.errors import InputError
from msdd_fast.ops._checks import FLOAT_DTYPES, check_device, check_floating
from msdd_fast.ops._example import normals
from msdd_fast.ops._registry import Op


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    packed: Tensor | None = None,
    swiglu: bool = False,
    *,
    backend: str | None = None,
) -> Tensor:
    """x W^T + b, or the SwiGLU of its halves; see the module. Raises InputError for what does not fit together."""
    check_floating("x", x)
    check_floating("weight", weight)
    if x.ndim < 1 or weight.ndim != 2 or weight.shape[1] != x.shape[-1] or weight.dtype != x.dtype:
        expected = f"(out, {x.shape[-1] if x.ndim else 'in'}) in the dtype of x, {x.dtype}"
        raise InputError(f"weight must be {expected}, got {tuple(weight.shape)} {weight.dtype}")
    check_device("weight", weight, "x", x)
    check_bool("swiglu", swiglu)
    if swiglu and len(weight) % 2:
        raise InputError(f"weight must hold an even number of rows with swiglu, [w1; w3], got {len(weight)}")
    if bias is not None:
        check_floating("bias", bias)
        if bias.shape != weight.shape[:1] or bias.dtype != x.dtype:
            raise InputError(f"bias must be ({len(weight)},) {x.dtype}, got {tuple(bias.shape)} {bias.dtype}")
        check_device("bias", bias, "x", x)
    out: Tensor = OP(x, weight, bias, packed, swiglu, backend=backend)
    return out


def pack_linear(weight: Tensor, swiglu: bool = False) -> Tensor:
    """The weight (out, in) as this machine's C++ kernel reads it, for ``packed``; one dimension, padded.

    Raises BackendUnavailableError without the extension.
    """
    return native.pack_linear(weight.detach(), swiglu)


def pack_if_built(weight: Tensor) -> Tensor | None:
    """``pack_linear``, or None without the extension."""
    return pack_linear(weight) if extension_status()[0] else None


def linear_eager(x: Tensor, weight: Tensor, bias: Tensor | None, packed: Tensor | None, swiglu: bool) -> Tensor:
    """Reference: plain torch."""
    y = F.linear(x, weight, bias)
    if not swiglu:
        return y
    a, b = y.chunk(2, dim=-1)
    return F.silu(a) * b


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, packed: Tensor | None, swiglu: bool) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(weight) // 2 if swiglu else len(weight))


def _cpu(x: Tensor, weight: Tensor, bias: Tensor | None, packed: Tensor | None, swiglu: bool) -> Tensor:
    assert packed is not None
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    y = native.linear(rows, packed, None if bias is None else bias.contiguous(), len(weight), swiglu)
    return y.view(*x.shape[:-1], y.shape[1])


def _prepare(
    x: Tensor, weight: Tensor, bias: Tensor | None, packed: Tensor | None, swiglu: bool
) -> Callable[..., Tensor] | None:
    """``_cpu`` for tensors of this layout; None where it has to copy one."""
    if not x.is_contiguous() or packed is None or (bias is not None and not bias.is_contiguous()):
        return None
    out = x.new_empty(*x.shape[:-1], len(weight) // 2 if swiglu else len(weight))
    rows, out_rows = (t.flatten(0, -2) if t.ndim > 1 else t[None] for t in (x, out))
    run = native.linear.prepare(rows, packed, bias, len(weight), swiglu, out_rows)
    shape, strides = tuple(out.shape), out.stride()  # and no view of rows, which costs as much as all of this
    if bias is None:
        return lambda x, _, packed: run(x, packed, x.new_empty_strided(shape, strides))
    return lambda x, _, bias, packed: run(x, packed, bias, x.new_empty_strided(shape, strides))


def _kernel_fits(x: Tensor, weight: Tensor, bias: Tensor | None, packed: Tensor | None, swiglu: bool) -> Verdict:
    if x.dtype not in FLOAT_DTYPES:
        return False, f"works in float32, bfloat16 and float16, got {x.dtype}"
    return packed is not None, "needs the weight in its own layout: packed=pack_linear(weight)"


def _example() -> tuple[Any, ...]:
    x, weight, bias = normals((2, 3, 24), (10, 24), (10,))
    return x, weight, bias, pack_if_built(weight), False


OP = Op(
    "linear",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? packed, bool swiglu) -> Tensor",
    linear_eager,
    _fake,
    _example,
)
OP.register(CPU, _cpu, _kernel_fits, prepare=_prepare)
