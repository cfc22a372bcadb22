"""pixel_block: the second half of PiD's pixel block, with a modulation for every pixel that its token's features
make.

    gate1, shift2, scale2, gate2 = (s W^T + b) as (R, K, 4, C)
    x1  = x + gate1 * y
    h   = rms_weight * (x1 / sqrt(mean(x1^2) + eps)) * (1 + scale2) + shift2    over the C channels of a pixel
    out = x1 + gate2 * (W2 gelu(W1 h + b1) + b2)                                with the exact GELU, by erf

x and y (R, K, C): R tokens of K pixels; y is what ``expand_from_attn`` makes. s (R, D). weight (K * 4 * C, D) and bias
(K * 4 * C,) of s's dtype: the rows of the modulation's matrix that make these four (``split_modulation``). rms_weight
(C,), W1 (H, C), b1 (H,), W2 (C, H), b2 (C,). ``packed`` is ``pack_linear(weight)``; only cpu needs it. out (R, K, C) is
contiguous, of x's dtype.

All float32, bfloat16 or float16 (eager: any float dtype); x may be wider than s. eager writes the modulation, R K 4 C
elements, whole. cpu keeps it in cache, in float32, and rounds once; triton writes it for at most CHUNK_BYTES of rows at
a time. Rows are independent. R K (8 C D + 4 C H) FLOP. Eager is differentiable.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from msdd_fast.backends.choice import Verdict
from msdd_fast.backends.triton import TRITON
from msdd_fast.errors import InputError
from msdd_fast.layout import with_contiguous_rows
from msdd_fast.native._call import in_order
from msdd_fast.ops._adaln import rms_norm
from msdd_fast.ops._checks import check_device, check_eps, check_floating
from msdd_fast.ops._example import normals
from msdd_fast.ops._native import register_native
from msdd_fast.ops._pixels import MAX_HIDDEN, check_pixels, has_packed, pixels_fit
from msdd_fast.ops._registry import Op, all_of
from msdd_fast.ops.linear import pack_if_built
from msdd_fast.ops.norm_modulate import NORM_EPS


def pixel_block(
    x: Tensor,
    y: Tensor,
    s: Tensor,
    weight: Tensor,
    bias: Tensor,
    rms_weight: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    packed: Tensor | None = None,
    eps: float = NORM_EPS,
    *,
    backend: str | None = None,
) -> Tensor:
    """Two gated residuals of pixels; see the module. Raises InputError for sizes that do not fit together."""
    check_pixels(x, s, weight, bias, rms_weight, 4)
    check_floating("y", y)
    if y.shape != x.shape:
        raise InputError(f"y must have the shape of x, {tuple(x.shape)}, got {tuple(y.shape)}")
    check_device("y", y, "x", x)
    channels = x.shape[2]
    check_floating("fc1_weight", fc1_weight)
    hidden = len(fc1_weight) if fc1_weight.ndim else 0
    for name, t, shape in (
        ("fc1_weight", fc1_weight, (hidden, channels)),
        ("fc1_bias", fc1_bias, (hidden,)),
        ("fc2_weight", fc2_weight, (channels, hidden)),
        ("fc2_bias", fc2_bias, (channels,)),
    ):
        check_floating(name, t)
        if t.shape != shape or t.dtype != fc1_weight.dtype:
            raise InputError(f"{name} must be {shape} {fc1_weight.dtype}, got {tuple(t.shape)} {t.dtype}")
        check_device(name, t, "x", x)
    out: Tensor = OP(
        *(x, y, s, weight, bias, rms_weight, fc1_weight, fc1_bias, fc2_weight, fc2_bias, packed, check_eps(eps)),
        backend=backend,
    )
    return out


def split_modulation(
    weight: Tensor, bias: Tensor, channels: int
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(weight, bias) of ``pixel_modulate`` and of ``pixel_block``, copied from the released ones.

    weight (K * 6 * C, D), bias (K * 6 * C,): for every pixel shift1, scale1, gate1, shift2, scale2, gate2.
    """
    if channels < 1 or weight.ndim != 2 or len(weight) % (6 * channels):
        raise InputError(f"weight must be (K * 6 * {channels}, D), got {tuple(weight.shape)}")
    if bias.shape != weight.shape[:1]:
        raise InputError(f"bias must be ({len(weight)},), got {tuple(bias.shape)}")
    w, b = weight.unflatten(0, (-1, 6, channels)), bias.unflatten(0, (-1, 6, channels))
    first, second = ((w[:, part].flatten(0, 2), b[:, part].flatten()) for part in (slice(2), slice(2, 6)))
    return first, second


def pixel_block_eager(
    x: Tensor,
    y: Tensor,
    s: Tensor,
    weight: Tensor,
    bias: Tensor,
    rms_weight: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    packed: Tensor | None = None,
    eps: float = NORM_EPS,
) -> Tensor:
    """Reference: plain torch, with the whole modulation in memory."""
    rows, pixels, channels = x.shape
    gate1, shift2, scale2, gate2 = F.linear(s, weight, bias).view(rows, pixels, 4, channels).unbind(2)
    x1 = (x + gate1 * y).to(x.dtype)
    h = rms_norm(x1, rms_weight, eps) * (1 + scale2) + shift2
    h = F.gelu(F.linear(h.to(fc1_weight.dtype), fc1_weight, fc1_bias))
    return (x1 + gate2 * F.linear(h, fc2_weight, fc2_bias)).to(x.dtype).contiguous()


def _contiguous(
    x: Tensor,
    y: Tensor,
    s: Tensor,
    weight: Tensor,
    bias: Tensor,
    rms_weight: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    packed: Tensor | None = None,
    eps: float = NORM_EPS,
) -> tuple[Any, ...]:
    """The arguments as the C++ kernel reads them: the packed weight in place of the weight."""
    small = (t.contiguous() for t in (bias, rms_weight, fc1_weight, fc1_bias, fc2_weight, fc2_bias))
    return x.contiguous(), y.contiguous(), with_contiguous_rows(s), packed, *small, eps


def _native_arguments(*args: Any) -> tuple[Any, ...]:
    return *_contiguous(*args), ""  # the machine's SIMD level


def _triton(x: Tensor, y: Tensor, s: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    from msdd_fast.kernels.pixel_block import pixel_block as launch

    x, y, s, _, *small = _contiguous(x, y, s, weight, *rest)
    return launch(x, y, s, weight, *small)


def _kernels_fit(*args: Any) -> Verdict:
    hidden = len(args[6])
    small = hidden <= MAX_HIDDEN, f"works with at most {MAX_HIDDEN} hidden channels, got {hidden}"
    return all_of(pixels_fit(*args[:10]), small)


def _cpu_fits(*args: Any) -> Verdict:
    return all_of(_kernels_fit(*args), has_packed(args[10]))


def _fake(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _example() -> tuple[Any, ...]:
    x, y, s, weight, *small = normals(
        *[(5, 2, 4), (5, 2, 4), (5, 6), (32, 6), (32,), (4,)], *[(7, 4), (7,), (4, 7), (4,)]
    )
    return x, y, s, weight, *small, pack_if_built(weight)


OP = Op(
    "pixel_block",
    "(Tensor x, Tensor y, Tensor s, Tensor weight, Tensor bias, Tensor rms_weight, Tensor fc1_weight, Tensor fc1_bias, "
    "Tensor fc2_weight, Tensor fc2_bias, Tensor? packed, float eps=1e-6) -> Tensor",
    pixel_block_eager,
    _fake,
    _example,
)
native_pixel_block = in_order(
    "pixel_block",
    ("x", "y", "s", "packed", "bias", "rms_weight", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias"),
    _fake,
)
register_native(OP, native_pixel_block, _native_arguments, _cpu_fits)
OP.register(TRITON, _triton, _kernels_fit)
