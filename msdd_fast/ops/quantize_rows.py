"""quantize_rows: rows to float8 with one scale each, for matrix products with row-wise scales (engine/fp8.py).

    amax_r = max(max_i |x_ri|, 1e-12)        scale_r = amax_r / 448        q_ri = e4m3(x_ri * (448 / amax_r))

so that q * scale is x to 3 bits of mantissa: relative error at most 2^-4 for elements above amax / 28,672, absolute
error at most amax / 458,752 below. 448 is the largest e4m3 number. x (R, D) is float32, bfloat16 or float16; q (R, D)
is float8_e4m3fn, scale (R, 1) float32. A row of zeros gives zeros; NaN and Inf become NaN. Every backend computes in
float32 in this order and rounds to nearest, ties to even, so finite rows agree bit for bit. The kernel reads x once:
moves R D elements of x's dtype, R D bytes and 4 R bytes, and takes D up to 8192. For inference only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from msdd_fast.backends.choice import Verdict
from msdd_fast.backends.triton import TRITON
from msdd_fast.errors import InputError
from msdd_fast.ops._checks import check_float
from msdd_fast.ops._example import normals
from msdd_fast.ops._registry import Op

LARGEST = 448.0
TINY = 1e-12
MAX_WIDTH = 8192


def quantize_rows(x: Tensor, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """(q, scale) of rows; see the module. Raises InputError for anything but (R, D)."""
    check_float("x", x)
    if x.ndim != 2 or x.shape[1] < 1:
        raise InputError(f"x must be (R, D) with D at least 1, got {tuple(x.shape)}")
    q, scale = OP(x, backend=backend)
    return q, scale


def quantize_rows_eager(x: Tensor) -> tuple[Tensor, Tensor]:
    """Reference: plain torch."""
    x = x.float().contiguous()
    amax = x.abs().amax(dim=1, keepdim=True).clamp_min(TINY)
    # A tensor, because torch turns quotients with a number into products with a rounded reciprocal; kernels divide.
    largest = torch.full_like(amax, LARGEST)
    return (x * (largest / amax)).to(torch.float8_e4m3fn), amax / largest


def _fake(x: Tensor) -> tuple[Tensor, Tensor]:
    q = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    return q, torch.empty((len(x), 1), dtype=torch.float32, device=x.device)


def _triton(x: Tensor) -> tuple[Tensor, Tensor]:
    from msdd_fast.kernels.quantize_rows import quantize_rows as launch

    return launch(x.contiguous())


def _kernel_fits(x: Tensor) -> Verdict:
    if x.shape[1] > MAX_WIDTH:
        return False, f"works on rows of at most {MAX_WIDTH} elements, got {x.shape[1]}"
    if x.device.type == "cuda" and torch.cuda.get_device_capability(x.device) < (8, 9):
        return False, "needs a GPU that converts to float8: sm_89 or newer"
    return True, "float8"


def _example() -> tuple[Any, ...]:
    return tuple(normals((6, 24)))


OP = Op("quantize_rows", "(Tensor x) -> (Tensor, Tensor)", quantize_rows_eager, _fake, _example)
OP.register(TRITON, _triton, _kernel_fits)
