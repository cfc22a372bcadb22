"""convolution: a 3 x 3 convolution, the norm before it and the sum behind it (docs/spec.md#ssdd-network).

    h = norm([x, more])                                            joined along the channels, C + C'
    out = conv3x3(h, weight) + bias + sum                          kind "same", padding 1
    out = conv3x3(h, weight, stride 2) + bias + sum                kind "down", padding 1
    out = conv3x3(nearest x 2 of h, weight) + bias + sum           kind "up"
    sum = added   or   conv1x1([added, added_more], shortcut)   or   0

norm is ``group_norm_modulate_silu`` of ``groups`` groups with norm_weight, norm_bias, scale, shift; with ``groups`` 0
only SiLU, or nothing. x (B, C, H, W), more (B, C', H, W), weight (out, C + C', 3, 3), shortcut (out, Ca + Ca') of kind
"same" only; added (B, out, H', W'), or with a shortcut (B, Ca, H, W), joined with added_more (B, Ca', H, W). All of
these have one dtype, float32, bfloat16 or float16 (eager: any float dtype), and out (B, out, H', W') has it too; H' is
H, H / 2 rounded up, or 2 H. bias (out,) and the tables of the norm are of any of the dtypes. out is channels-last; maps
that are not are copied first. ``packed`` is ``pack_convolution(weight, kind, shortcut)``, in the layout that this
machine's kernel reads: weights do not change from call to call, so it is made once. Only cpu reads it, in place of
weight and shortcut, and only cpu needs it; without it ``auto`` takes eager.

eager rounds after every operation and is differentiable. cpu normalises in float32, rounds the result of the norm to
bfloat16 where the machine multiplies pairs of it, sums in float32 and rounds once; its bits depend neither on the other
images nor on the number of threads. "up" multiplies by four matrices of 2 x 2 taps, sums of the nine, each rounded once
to the dtype. Moves every map once, those before a norm twice, and the weight. Takes 18 (C + C') out FLOP for each pixel
of out, on cpu 8 (C + C') out for "up", and 2 (Ca + Ca') out with a shortcut.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from msdd_fast import native
from msdd_fast.backends.choice import Verdict
from msdd_fast.backends.extension import extension_status
from msdd_fast.diffusion.checks import check_bool
from msdd_fast.errors import InputError
from msdd_fast.layout import channels_last
from msdd_fast.native.convolution import KINDS, result_size
from msdd_fast.ops._checks import check_device, check_eps, check_floating
from msdd_fast.ops._example import normals
from msdd_fast.ops._native import register_native
from msdd_fast.ops._norm import (
    as_cells,
    channels_fit,
    check_channels,
    check_groups,
    check_map,
    check_modulation,
    float_dtypes_fit,
)
from msdd_fast.ops._registry import Op, all_of
from msdd_fast.ops.group_norm_modulate_silu import group_norm_modulate_silu_eager


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    more: Tensor | None = None,
    kind: str = "same",
    groups: int = 0,
    eps: float = 1e-5,
    silu: bool = False,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    added: Tensor | None = None,
    added_more: Tensor | None = None,
    shortcut: Tensor | None = None,
    packed: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """The convolution of the normalised maps, plus bias and sum, channels-last.

    Args:
        x: (B, C, H, W).
        weight: (out, C + C', 3, 3) in x's dtype.
        bias: (out,) or None.
        more: (B, C', H, W) in x's dtype, joined to x; or None.
        kind: "same", "down" (stride 2) or "up" (nearest x 2 before it).
        groups: of the norm, a divisor of C + C'; 0 for no norm.
        eps: added to the variance.
        silu: activate what is convolved, also without a norm.
        norm_weight, norm_bias: (C + C',) or None.
        scale, shift: (B, C + C', h, w) or (B, C + C'), of one shape, h and w dividing H and W; both or neither.
        added: (B, out, H', W') in x's dtype, or with ``shortcut`` (B, Ca, H, W); or None.
        added_more: (B, Ca', H, W), joined to ``added``; only with ``shortcut``.
        shortcut: (out, Ca + Ca') in x's dtype, of kind "same": the 1 x 1 convolution of ``added``; or None.
        packed: ``pack_convolution(weight, kind, shortcut)``, for the backend "cpu".

    Raises InputError for anything else.
    """
    check_map("x", x)
    if not isinstance(kind, str) or kind not in KINDS:
        raise InputError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    b, channels, height, width = x.shape
    if more is not None:
        _check_joined("more", more, (b, None, height, width), x)
        channels += more.shape[1]
    _check_weight("weight", weight, (channels, 3, 3), x)
    features = len(weight)
    check_channels("bias", bias, features, x)
    if type(groups) is int and groups == 0:
        tables = {"norm_weight": norm_weight, "norm_bias": norm_bias, "scale": scale, "shift": shift}
        given = next((name for name, t in tables.items() if t is not None), None)
        if given is not None:
            raise InputError(f"{given} needs a norm: groups must be at least 1, got 0")
    else:
        check_groups(groups, channels, "x" if more is None else "x and more")
    eps = check_eps(eps)
    check_bool("silu", silu)
    check_channels("norm_weight", norm_weight, channels, x)
    check_channels("norm_bias", norm_bias, channels, x)
    check_modulation(scale, shift, channels, x)
    _check_sum(added, added_more, shortcut, features, kind, x)
    out: Tensor = OP(
        *(x, weight, bias, more, kind, groups, eps, silu, norm_weight, norm_bias, scale, shift),
        *(added, added_more, shortcut, packed),
        backend=backend,
    )
    return out


def _check_joined(name: str, t: Tensor, shape: tuple[int | None, ...], x: Tensor) -> None:
    """A map of this shape, None standing for any number of channels, in x's dtype."""
    check_map(name, t)
    check_device(name, t, "x", x)
    if any(n not in (None, m) for n, m in zip(shape, t.shape, strict=True)) or t.dtype != x.dtype:
        expected = ", ".join("C" if n is None else str(n) for n in shape)
        raise InputError(f"{name} must be ({expected}) in the dtype of x, {x.dtype}, got {tuple(t.shape)} {t.dtype}")


def _check_weight(name: str, t: Tensor, inner: tuple[int, ...], x: Tensor, features: int | None = None) -> None:
    """(out, *inner) in x's dtype, of at least one row, or of ``features``."""
    check_floating(name, t)
    rows = len(t) if t.ndim else 0
    if t.shape[1:] != inner or rows != (features or max(1, rows)) or t.dtype != x.dtype:
        expected = f"({', '.join(map(str, (features or 'out', *inner)))}) in the dtype of x, {x.dtype}"
        raise InputError(f"{name} must be {expected}, got {tuple(t.shape)} {t.dtype}")
    check_device(name, t, "x", x)


def _check_sum(
    added: Tensor | None, added_more: Tensor | None, shortcut: Tensor | None, features: int, kind: str, x: Tensor
) -> None:
    if added is None:
        if shortcut is not None or added_more is not None:
            raise InputError(f"{'added_more' if shortcut is None else 'shortcut'} needs a map: added is missing")
        return
    b, _, height, width = x.shape
    if shortcut is None:
        if added_more is not None:
            raise InputError("added_more needs a shortcut")
        return _check_joined("added", added, (b, features, *result_size(height, width, kind)), x)
    if kind != "same":
        raise InputError(f"shortcut needs a convolution of kind 'same', got {kind!r}")
    _check_joined("added", added, (b, None, height, width), x)
    channels = added.shape[1]
    if added_more is not None:
        _check_joined("added_more", added_more, (b, None, height, width), x)
        channels += added_more.shape[1]
    _check_weight("shortcut", shortcut, (channels,), x, features)


def pack_convolution(weight: Tensor, kind: str = "same", shortcut: Tensor | None = None) -> Tensor:
    """The weight (out, in, 3, 3) as this machine's C++ kernel reads it for maps in its dtype, for ``packed``; with the
    shortcut (out, also) that goes with it. One dimension, padded.

    Raises BackendUnavailableError without the extension.
    """
    return native.pack_convolution(weight, kind, weight.dtype, shortcut)


def pack_if_built(weight: Tensor, kind: str = "same", shortcut: Tensor | None = None) -> Tensor | None:
    """``pack_convolution``, or None without the extension."""
    return pack_convolution(weight, kind, shortcut) if extension_status()[0] else None


def convolution_eager(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    more: Tensor | None = None,
    kind: str = "same",
    groups: int = 0,
    eps: float = 1e-5,
    silu: bool = False,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    added: Tensor | None = None,
    added_more: Tensor | None = None,
    shortcut: Tensor | None = None,
    packed: Tensor | None = None,
) -> Tensor:
    """Reference: plain torch, rounded after every operation as the dtype has it."""
    h = _joined(x, more)
    if groups:
        h = group_norm_modulate_silu_eager(h, groups, eps, norm_weight, norm_bias, scale, shift, silu)
    elif silu:
        h = F.silu(h)
    if kind == "up":
        h = F.interpolate(h, scale_factor=2, mode="nearest")
    out = F.conv2d(h, weight, None if bias is None else bias.to(x.dtype), 2 if kind == "down" else 1, 1)
    if added is not None:
        a = _joined(added, added_more)
        out = out + (a if shortcut is None else F.conv2d(a, shortcut[:, :, None, None]))
    return channels_last(out)


def _joined(x: Tensor, more: Tensor | None) -> Tensor:
    return x if more is None else torch.cat([x, more], dim=1)


def _native_arguments(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    more: Tensor | None,
    kind: str,
    groups: int,
    eps: float,
    silu: bool,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    added: Tensor | None,
    added_more: Tensor | None,
    shortcut: Tensor | None,
    packed: Tensor | None,
) -> tuple[Any, ...]:
    """The arguments as the C++ kernel reads them: the packed weight in place of weight and shortcut."""
    more, added, added_more = (None if t is None else channels_last(t) for t in (more, added, added_more))
    bias, norm_weight, norm_bias = (None if t is None else t.contiguous() for t in (bias, norm_weight, norm_bias))
    tables = norm_weight, norm_bias, as_cells(scale), as_cells(shift)
    sums = added, added_more, shortcut is not None
    numbers = len(weight), kind, groups, eps, silu
    return channels_last(x), more, packed, bias, *numbers, *tables, *sums, ""  # the machine's SIMD level


def _kernel_fits(*args: Any) -> Verdict:
    x, _, _, more, *_ = args
    added, added_more, shortcut, packed = args[-4:]
    joined = [(x, more)] if shortcut is None else [(x, more), (added, added_more)]
    channels = max(a.shape[1] + (0 if b is None else b.shape[1]) for a, b in joined)
    has_packed = packed is not None, "needs the weight in its own layout: packed=pack_convolution(weight, ...)"
    return all_of(float_dtypes_fit(args[:-1]), channels_fit(channels), has_packed)


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, more: Tensor | None, kind: str, *_: object) -> Tensor:
    shape = (len(x), len(weight), *result_size(x.shape[2], x.shape[3], kind))
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _example() -> tuple[Any, ...]:
    maps = [(2, 2, 4, 6), (2, 1, 4, 6), (2, 2, 4, 6), (2, 1, 4, 6)]
    x, more, added, added_more = map(channels_last, normals(*maps))
    weight, shortcut, *tables = normals((5, 3, 3, 3), (5, 3), (5,), (3,), (3,), (2, 3, 2, 3), (2, 3, 2, 3))
    bias, *norm = tables
    packed = pack_if_built(weight, shortcut=shortcut)
    return x, weight, bias, more, "same", 3, 1e-5, True, *norm, added, added_more, shortcut, packed


OP = Op(
    "convolution",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? more, str kind, int groups, float eps, bool silu, "
    "Tensor? norm_weight, Tensor? norm_bias, Tensor? scale, Tensor? shift, Tensor? added, Tensor? added_more, "
    "Tensor? shortcut, Tensor? packed) -> Tensor",
    convolution_eager,
    _fake,
    _example,
)
register_native(OP, native.convolution, _native_arguments, _kernel_fits)
