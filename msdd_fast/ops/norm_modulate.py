"""norm_modulate: LayerNorm without affine, then adaLN (docs/spec.md#adaln).

    h = (x - mean) / sqrt(var + 1e-6) * (1 + scale) + shift        over the last dimension, var about the mean

x (*, D) is treated as R rows; shift and scale (G, D) are tables, G of them spread over the rows: G equal runs, so for
x (B, N, D) and G = B every image has its own, or two runs cut at row ``split``, so for two token streams in one
token-major buffer. x, shift and scale each float32, bfloat16 or float16 (eager: any float dtype); tables may be views
whose rows are apart. h has x's shape and dtype and is contiguous. Kernels compute in float32, the variance in a second
pass, and round once; they take D up to 8192. Moves 2 R D elements of x's dtype and, once each, the tables. Eager is
differentiable.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from msdd_fast import native
from msdd_fast.backends.choice import Verdict
from msdd_fast.backends.triton import TRITON
from msdd_fast.layout import expand_rows, rows_per_entry
from msdd_fast.ops._adaln import check_adaln, kernels_fit
from msdd_fast.ops._checks import check_eps
from msdd_fast.ops._native import register_native
from msdd_fast.ops._registry import Op

NORM_EPS = 1e-6


def norm_modulate(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    split: int | None = None,
    eps: float = NORM_EPS,
    *,
    backend: str | None = None,
) -> Tensor:
    """LayerNorm(x; eps) * (1 + scale) + shift; see the module. Raises InputError for sizes that do not fit together."""
    check_adaln(x, split, shift=shift, scale=scale)
    h: Tensor = OP(x, shift, scale, split, check_eps(eps), backend=backend)
    return h


def norm_modulate_eager(x: Tensor, shift: Tensor, scale: Tensor, split: int | None, eps: float = NORM_EPS) -> Tensor:
    """Reference: plain torch, rounded after every operation as the dtype has it."""
    rows = x.shape[:-1].numel()
    shift, scale = expand_rows(shift, rows, split), expand_rows(scale, rows, split)
    h = F.layer_norm(x, x.shape[-1:], eps=eps)
    h = h.reshape(len(scale), rows // max(1, len(scale)), x.shape[-1])
    return (h * (1 + scale) + shift).reshape(x.shape).to(x.dtype)


def _contiguous(x: Tensor, shift: Tensor, scale: Tensor, split: int | None, eps: float = NORM_EPS) -> tuple[Any, ...]:
    """The arguments as the kernels read them."""
    (shift, scale), run = rows_per_entry([shift, scale], x.shape[:-1].numel(), split)
    return x.contiguous(), shift, scale, run, eps


def _triton(*args: Any) -> Tensor:
    from msdd_fast.kernels.norm_modulate import norm_modulate as launch

    return launch(*_contiguous(*args))


def _kernels_fit(x: Tensor, shift: Tensor, scale: Tensor, *_: Any) -> Verdict:
    return kernels_fit(x, shift, scale)


OP = Op(
    "norm_modulate",
    "(Tensor x, Tensor shift, Tensor scale, int? split, float eps=1e-6) -> Tensor",
    norm_modulate_eager,
    lambda x, *_: torch.empty_like(x, memory_format=torch.contiguous_format),
)
register_native(OP, native.norm_modulate, _contiguous, _kernels_fit)
OP.register(TRITON, _triton, _kernels_fit)
