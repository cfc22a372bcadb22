"""norm_modulate: LayerNorm without affine, or RMSNorm, then adaLN (docs/spec.md#adaln).

    h = (x - mean) / sqrt(var + 1e-6) * (1 + scale) + shift        over the last dimension, var about the mean
    h = rms_weight * (x / sqrt(mean(x^2) + 1e-6)) * (1 + scale) + shift                 with ``rms_weight``

x (*, D) is treated as R rows; shift and scale (G, D) are tables, G of them spread over the rows: G equal runs, so for
x (B, N, D) and G = B every image has its own, or two runs cut at row ``split``, so for two token streams in one
token-major buffer. rms_weight is (D,), or with ``split`` (2, D), an entry for each run. x, tables and weight each
float32, bfloat16 or float16 (eager: any float dtype); tables may be views whose rows are apart. h has x's shape and
dtype and is contiguous. Kernels compute in float32, the variance in a second pass, and round once; eager casts to x's
dtype before the weight. Kernels take D up to 8192. Moves 2 R D elements of x's dtype and, once each, the tables. Eager
is differentiable.
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
from msdd_fast.ops._adaln import check_adaln, check_rms_weight, kernels_fit, rms_norm
from msdd_fast.ops._checks import check_eps
from msdd_fast.ops._example import normals
from msdd_fast.ops._native import register_native
from msdd_fast.ops._registry import Op

NORM_EPS = 1e-6


def norm_modulate(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    split: int | None = None,
    eps: float = NORM_EPS,
    rms_weight: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """norm(x; eps) * (1 + scale) + shift; see the module. Raises InputError for sizes that do not fit together."""
    check_adaln(x, split, shift=shift, scale=scale)
    if rms_weight is not None:
        check_rms_weight(rms_weight, x, split)
    h: Tensor = OP(x, shift, scale, split, check_eps(eps), rms_weight, backend=backend)
    return h


def norm_modulate_eager(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    split: int | None,
    eps: float = NORM_EPS,
    rms_weight: Tensor | None = None,
) -> Tensor:
    """Reference: plain torch, rounded after every operation as the dtype has it."""
    rows = x.shape[:-1].numel()
    shift, scale = expand_rows(shift, rows, split), expand_rows(scale, rows, split)
    groups = (len(scale), rows // max(1, len(scale)), x.shape[-1])
    if rms_weight is None:
        h = F.layer_norm(x, x.shape[-1:], eps=eps).reshape(groups)
    else:
        h = rms_norm(x.reshape(groups), expand_rms_weight(rms_weight, rows, split), eps)
    return (h * (1 + scale) + shift).reshape(x.shape).to(x.dtype)


def expand_rms_weight(rms_weight: Tensor, rows: int, split: int | None) -> Tensor:
    """To broadcast over rows as ``expand_rows`` makes them."""
    return rms_weight if split is None else expand_rows(rms_weight, rows, split)


def _contiguous(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    split: int | None,
    eps: float = NORM_EPS,
    rms_weight: Tensor | None = None,
) -> tuple[Any, ...]:
    """The arguments as the kernels read them."""
    (shift, scale), run = rows_per_entry([shift, scale], x.shape[:-1].numel(), split)
    return x.contiguous(), shift, scale, run, eps, contiguous_rms_weight(rms_weight, split)


def contiguous_rms_weight(rms_weight: Tensor | None, split: int | None) -> Tensor | None:
    """As the kernels read it: the entry of every run that ``rows_per_entry`` leaves."""
    if rms_weight is None:
        return None
    weight = rms_weight[1] if split == 0 else rms_weight
    return weight if weight.stride(-1) == 1 else weight.contiguous()


def _triton(*args: Any) -> Tensor:
    from msdd_fast.kernels.norm_modulate import norm_modulate as launch

    return launch(*_contiguous(*args))


def _kernels_fit(
    x: Tensor, shift: Tensor, scale: Tensor, split: int | None, eps: float = NORM_EPS, rms_weight: Tensor | None = None
) -> Verdict:
    return kernels_fit(x, shift, scale, rms_weight)


def _example() -> tuple[Any, ...]:
    x, tables = normals((2, 3, 24), (2, 48))
    return x, *tables.split(24, 1), None


OP = Op(
    "norm_modulate",
    "(Tensor x, Tensor shift, Tensor scale, int? split, float eps=1e-6, Tensor? rms_weight=None) -> Tensor",
    norm_modulate_eager,
    lambda x, *_: torch.empty_like(x, memory_format=torch.contiguous_format),
    _example,
)
register_native(OP, native.norm_modulate, _contiguous, _kernels_fit)
OP.register(TRITON, _triton, _kernels_fit)
