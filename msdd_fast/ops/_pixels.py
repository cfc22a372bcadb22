"""What the two halves of the pixel block share: checks of their arguments and the limits of their kernels."""

from __future__ import annotations

from torch import Tensor

from msdd_fast.backends.choice import Verdict
from msdd_fast.errors import InputError
from msdd_fast.ops._checks import FLOAT_DTYPES, check_device, check_floating

MAX_CHANNELS = 64  # as in csrc/include/msdd_fast/pixel_block.h
MAX_HIDDEN = 4 * MAX_CHANNELS


def check_pixels(x: Tensor, s: Tensor, weight: Tensor, bias: Tensor, rms_weight: Tensor, chunks: int) -> None:
    """Raise InputError unless x is (R, K, C), s (R, D), weight (K * chunks * C, D), bias (K * chunks * C,), rms_weight
    (C,), weight and bias in the dtype of s.
    """
    check_floating("x", x)
    if x.ndim != 3 or x.shape[2] < 1:
        raise InputError(f"x must be (R, K, C) with C at least 1, got {tuple(x.shape)}")
    rows, pixels, channels = x.shape
    check_floating("s", s)
    if s.ndim != 2 or len(s) != rows:
        raise InputError(f"s must be ({rows}, D), got {tuple(s.shape)}")
    check_device("s", s, "x", x)
    count = pixels * chunks * channels
    for name, t, shape in (("weight", weight, (count, s.shape[1])), ("bias", bias, (count,))):
        check_floating(name, t)
        if t.shape != shape or t.dtype != s.dtype:
            raise InputError(f"{name} must be {shape} in the dtype of s, {s.dtype}, got {tuple(t.shape)} {t.dtype}")
        check_device(name, t, "x", x)
    check_floating("rms_weight", rms_weight)
    if rms_weight.shape != (channels,):
        raise InputError(f"rms_weight must be ({channels},), got {tuple(rms_weight.shape)}")
    check_device("rms_weight", rms_weight, "x", x)


def pixels_fit(x: Tensor, *others: Tensor) -> Verdict:
    """Whether the kernels' limits hold."""
    for t in (x, *others):
        if t.dtype not in FLOAT_DTYPES:
            return False, f"works in float32, bfloat16 and float16, got {t.dtype}"
    channels = x.shape[2]
    if channels % 4 or channels > MAX_CHANNELS:
        return False, f"needs a multiple of 4 channels, at most {MAX_CHANNELS}, got {channels}"
    return True, ""


def has_packed(packed: Tensor | None) -> Verdict:
    """Whether the C++ kernel's weight is there."""
    return packed is not None, "needs the weight in its own layout: packed=pack_linear(weight)"
