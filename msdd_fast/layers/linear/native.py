"""The extension's matrix product as a layer, and where it is taken."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from msdd_fast import native
from msdd_fast.backends import tuned
from msdd_fast.backends.extension import cpu_level, extension_status
from msdd_fast.errors import InputError

DEFAULT = "auto"
# Levels of the extension at which decodes with its products, recorded as programs, measured faster than with oneDNN and
# MKL (docs/engine.md). Elsewhere PyTorch multiplies until `msdd-fast tune` says otherwise.
MEASURED_LEVELS = ("avx2", "avx512", "avx512bf16")
MAX_PLANS = 256


class Plans:
    """Calls of a native product, prepared once for every layout of rows and results that occurs.

    Args:
        prepare: takes (x, out) and returns a function of (x, *tensors), or (x, *tensors, out) with an ``out``.
        tensors: weight and bias.
    """

    def __init__(
        self, prepare: Callable[[Tensor, Tensor | None], Callable[..., Tensor]], *tensors: Tensor | None
    ) -> None:
        self._prepare, self._tensors = prepare, tuple(t for t in tensors if t is not None)
        self._plans: dict[Any, Callable[..., Tensor]] = {}

    def __call__(self, x: Tensor, out: Tensor | None) -> Tensor:
        key = x.dtype, x.shape, x.stride(), None if out is None else (out.dtype, out.shape, out.stride())
        run = self._plans.get(key)
        if run is None:
            if len(self._plans) >= MAX_PLANS:
                self._plans.clear()
            run = self._plans[key] = self._prepare(x, out)
        return run(x, *self._tensors) if out is None else run(x, *self._tensors, out)

    def memory(self) -> int:
        """Bytes of the tensors."""
        return sum(t.nbytes for t in self._tensors)


class NativeLinear:
    """y = x W^T + b by the C++ product (ops/linear.py), weights (out, in) packed once; or the SwiGLU of its halves."""

    def __init__(self, weight: Tensor, bias: Tensor | None, swiglu: bool = False) -> None:
        packed, features = native.pack_linear(weight.contiguous(), swiglu), len(weight)
        self.row_bytes = 0
        self.out_features = features // 2 if swiglu else features
        self._run = Plans(lambda x, out: native.linear.prepare(x, packed, bias, features, swiglu, out), packed, bias)

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Rows x (R, in) in the weight's dtype; ``out`` (R, out) or None."""
        return self._run(x, out)

    def memory(self) -> int:
        """Bytes of weight and bias."""
        return self._run.memory()


def wanted() -> str:
    """MSDD_FAST_NATIVE_LINEAR: "auto", "0" or "1". Raises InputError for anything else."""
    choice = os.environ.get("MSDD_FAST_NATIVE_LINEAR") or DEFAULT
    if choice not in ("auto", "0", "1"):
        raise InputError(f"MSDD_FAST_NATIVE_LINEAR must be auto, 0 or 1, got {choice!r}")
    return choice


def products(weight: Tensor) -> tuple[set[str], str]:
    """What multiplies with a weight, and why: "cpu" is NativeLinear, "torch" is torch's own; both where it depends on
    the rows.

    By the table of backends/tuned.py; for a size that is not in it, by the level (``MEASURED_LEVELS``).
    MSDD_FAST_NATIVE_LINEAR = 1 or 0 takes the one or the other everywhere. Raises InputError for another value of it.
    """
    choice = wanted()
    usual = weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.bfloat16) and type(weight) is Tensor
    if not usual:
        return {"torch"}, f"{str(weight.dtype).removeprefix('torch.')} on {weight.device.type}"
    loaded, status = extension_status()
    if not loaded:
        return {"torch"}, f"msdd_fast._C {status}"
    if choice != "auto":
        return {"torch" if choice == "0" else "cpu"}, f"MSDD_FAST_NATIVE_LINEAR={choice}"
    measured = tuned.measured("linear", weight.device, weight.dtype, size_of(weight))
    if measured:
        return measured, "by the measured table"
    level = cpu_level("linear_level")
    if level in MEASURED_LEVELS:
        return {"cpu"}, f"faster with {level}"
    return {"torch"}, f"the extension's are not known to be faster with {level}"


def size_of(weight: Tensor) -> str:
    """What the table calls a weight (out, in)."""
    return f"{weight.shape[1]}x{weight.shape[0]}"
