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

import torch
import torch.nn.functional as F
from torch import Tensor

from msdd_fast.ops._adaln import rms_norm
from msdd_fast.ops._checks import check_eps
from msdd_fast.ops._pixels import check_pixels
from msdd_fast.ops._registry import Op
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


OP = Op(
    "pixel_modulate",
    "(Tensor x, Tensor s, Tensor weight, Tensor bias, Tensor rms_weight, Tensor? packed, float eps=1e-6) -> Tensor",
    pixel_modulate_eager,
    _fake,
)
