"""pixel_modulate: RMSNorm and adaLN of every pixel, with a modulation that its token's features make: the
first half of PiD's pixel block.

    shift, scale = (s W^T + b) as (R, K, 2, C)
    h = rms_weight * (x / sqrt(mean(x^2) + eps)) * (1 + scale) + shift          over the C channels of a pixel

x (R, K, C): R tokens of K pixels. s (R, D). weight (K * 2 * C, D) and bias (K * 2 * C,) of s's dtype: the rows of the
modulation's matrix that make shift1 and scale1 (``split_modulation``). rms_weight (C,). ``packed`` is
``pack_linear(weight)``; only cpu needs it. h (R, K, C) is contiguous, in the dtype of s: ``h.flatten(1)`` is what
``compress_to_attn`` takes.

All float32, bfloat16 or float16 (eager: any float dtype); x may be wider than s. eager writes the modulation, R K 2 C
elements, whole. cpu keeps it in cache, in float32, and rounds once; triton writes it for at most CHUNK_BYTES of rows at
a time. Rows are independent. 4 R K C D FLOP. Eager is differentiable.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from msdd_fast.backends.choice import Verdict
from msdd_fast.backends.triton import TRITON
from msdd_fast.layout import with_contiguous_rows
from msdd_fast.native._call import in_order
from msdd_fast.ops._adaln import rms_norm
from msdd_fast.ops._checks import check_eps
from msdd_fast.ops._example import normals
from msdd_fast.ops._native import register_native
from msdd_fast.ops._pixels import check_pixels, has_packed, pixels_fit
from msdd_fast.ops._registry import Op, all_of
from msdd_fast.ops.linear import pack_if_built
from msdd_fast.ops.norm_modulate import NORM_EPS


def pixel_modulate(
    x: Tensor,
    s: Tensor,
    weight: Tensor,
    bias: Tensor,
    rms_weight: Tensor,
    packed: Tensor | None = None,
    eps: float = NORM_EPS,
    *,
    backend: str | None = None,
) -> Tensor:
    """RMSNorm and adaLN of pixels; see the module. Raises InputError for sizes that do not fit together."""
    check_pixels(x, s, weight, bias, rms_weight, 2)
    h: Tensor = OP(x, s, weight, bias, rms_weight, packed, check_eps(eps), backend=backend)
    return h


def pixel_modulate_eager(
    x: Tensor,
    s: Tensor,
    weight: Tensor,
    bias: Tensor,
    rms_weight: Tensor,
    packed: Tensor | None = None,
    eps: float = NORM_EPS,
) -> Tensor:
    """Reference: plain torch, with the whole modulation in memory."""
    rows, pixels, channels = x.shape
    shift, scale = F.linear(s, weight, bias).view(rows, pixels, 2, channels).unbind(2)
    return (rms_norm(x, rms_weight, eps) * (1 + scale) + shift).to(s.dtype).contiguous()


def _fake(x: Tensor, s: Tensor, *_: object) -> Tensor:
    return torch.empty(x.shape, dtype=s.dtype, device=x.device)


def _contiguous(
    x: Tensor,
    s: Tensor,
    weight: Tensor,
    bias: Tensor,
    rms_weight: Tensor,
    packed: Tensor | None = None,
    eps: float = NORM_EPS,
) -> tuple[Any, ...]:
    """The arguments as the C++ kernel reads them: the packed weight in place of the weight."""
    return x.contiguous(), with_contiguous_rows(s), packed, bias.contiguous(), rms_weight.contiguous(), eps


def _triton(x: Tensor, s: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    from msdd_fast.kernels.pixel_modulate import pixel_modulate as launch

    x, s, _, *small = _contiguous(x, s, weight, *rest)
    return launch(x, s, weight, *small)


def _native_arguments(*args: Any) -> tuple[Any, ...]:
    return *_contiguous(*args), ""  # the machine's SIMD level


def _cpu_fits(*args: Any) -> Verdict:
    return all_of(_kernels_fit(*args), has_packed(args[5]))


def _kernels_fit(*args: Any) -> Verdict:
    return pixels_fit(*args[:5])


def _example() -> tuple[Any, ...]:
    x, s, weight, bias, rms_weight = normals((5, 2, 4), (5, 6), (16, 6), (16,), (4,))
    return x, s, weight, bias, rms_weight, pack_if_built(weight)


OP = Op(
    "pixel_modulate",
    "(Tensor x, Tensor s, Tensor weight, Tensor bias, Tensor rms_weight, Tensor? packed, float eps=1e-6) -> Tensor",
    pixel_modulate_eager,
    _fake,
    _example,
)
native_pixel_modulate = in_order("pixel_modulate", ("x", "s", "packed", "bias", "rms_weight"), _fake)
register_native(OP, native_pixel_modulate, _native_arguments, _cpu_fits)
OP.register(TRITON, _triton, _kernels_fit)
