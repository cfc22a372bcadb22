"""The engine's convolutions: channels-last maps in, channels-last maps out; cuDNN on a GPU, oneDNN or the extension on
a CPU.

``Separate`` and ``Fused`` are a convolution with the norm before it and the sum behind it: step by step, and in one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from msdd_fast import native
from msdd_fast.backends.extension import cpu_level, extension_status
from msdd_fast.layers.linear.native import MEASURED_LEVELS, wanted
from msdd_fast.layout import channels_last as channels_last
from msdd_fast.ops import Ops


class Convolution:
    """k x k, padding k // 2 (zeros, or the border ``replicated``), the weight (out, in, k, k) channels-last."""

    description = "convolutions of PyTorch (cuDNN, oneDNN)"

    def __init__(self, weight: Tensor, bias: Tensor | None, stride: int = 1, replicated: bool = False) -> None:
        self.weight, self.bias, self.stride, self.replicated = channels_last(weight), bias, stride, replicated

    def __call__(self, x: Tensor) -> Tensor:
        padding = self.weight.shape[2] // 2
        if self.replicated:
            x, padding = F.pad(x, (padding,) * 4, mode="replicate"), 0
        return channels_last(F.conv2d(x, self.weight, self.bias, self.stride, padding))

    def strip(self, x: Tensor) -> Tensor:
        """Of some rows of a map, given with the k // 2 rows above and below them: zeros beyond the map."""
        return channels_last(F.conv2d(x, self.weight, self.bias, self.stride, (0, self.weight.shape[3] // 2)))

    def memory(self) -> int:
        """Bytes of the weights."""
        return sum(t.nbytes for t in (self.weight, self.bias) if t is not None)


class UpsampleConvolution:
    """Nearest x2, then 3 x 3 with padding 1, without the upsampled map.

    Each pixel of the result sees 2 x 2 pixels of x. The four cases, of its row and its column being even or odd, are
    four 2 x 2 convolutions; together they are one transposed convolution with a 4 x 4 kernel and stride 2, whose taps
    are sums of the 3 x 3 ones. 4/9 of the FLOPs, exact but for rounding, the border included.
    """

    description = Convolution.description

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        """``weight`` (out, in, 3, 3), float32, of the convolution behind the upsampling; ``bias`` has the dtype."""
        folded = _fold(_fold(weight, 2), 3).to(bias.dtype)
        self.weight, self.bias = channels_last(folded.transpose(0, 1)), bias  # (in, out, 4, 4)

    def __call__(self, x: Tensor) -> Tensor:
        return channels_last(F.conv_transpose2d(x, self.weight, self.bias, stride=2, padding=1))

    def memory(self) -> int:
        """Bytes of the weights."""
        return self.weight.nbytes + self.bias.nbytes


class Shortcut:
    """A 1 x 1 convolution without a bias that is added to what is there: the epilogue of a matrix product."""

    description = "products of PyTorch, added to a result"

    def __init__(self, weight: Tensor) -> None:
        self.weight_t = weight.flatten(1).t()  # (in, out)

    def __call__(self, x: Tensor, out: Tensor, inputs: slice = slice(None)) -> Tensor:
        """Rows (R, out) += rows (R, in) W^T; x may be some of the ``inputs``."""
        return torch.addmm(out, x, self.weight_t[inputs], out=out)

    def memory(self) -> int:
        """Bytes of the weights."""
        return self.weight_t.nbytes


class Norm(NamedTuple):
    """A GroupNorm, and what modulates it; the arguments of ``ops.group_norm_modulate_silu`` without the activation.

    Attributes:
        weight, bias: (C,) or None.
        scale, shift: (B, C, h, w) or None.
    """

    groups: int
    eps: float
    weight: Tensor | None = None
    bias: Tensor | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None


class Convolve(Protocol):
    """convolution(silu(norm(maps))) + what is added.

    Attributes:
        in_channels, out_channels: of all maps together, and of the result.
        description: who computes it, and why.
    """

    in_channels: int
    out_channels: int
    description: str

    def __call__(
        self, maps: Sequence[Tensor], norm: Norm | None = None, silu: bool = False, added: Sequence[Tensor] = ()
    ) -> Tensor:
        """Of one map or two (B, C, H, W), which are joined along the channels. ``added`` is a map like the result; or,
        where the convolution has a shortcut, one or two whose 1 x 1 convolution is."""
        ...

    def memory(self) -> int:
        """Bytes of the weights."""
        ...


class Separate:
    """By PyTorch and the op ``group_norm_modulate_silu``, one after the other."""

    def __init__(
        self, convolution: Convolution | UpsampleConvolution, shortcut: Shortcut | None, ops: Ops, shape: torch.Size
    ) -> None:
        """``shape`` of the weight (out, in, 3, 3). The bias of the shortcut is in that of ``convolution``."""
        self.convolution, self.shortcut, self.ops = convolution, shortcut, ops
        self.out_channels, self.in_channels = shape[:2]
        self.description = convolution.description

    def __call__(
        self, maps: Sequence[Tensor], norm: Norm | None = None, silu: bool = False, added: Sequence[Tensor] = ()
    ) -> Tensor:
        x = maps[0] if len(maps) == 1 else channels_last(torch.cat(list(maps), dim=1))
        if norm is not None:
            x = self.ops.group_norm_modulate_silu(x, *norm, silu)
        elif silu:
            x = F.silu(x)
        h = self.convolution(x)
        self.add_to(h, added)
        return h

    def add_to(self, h: Tensor, added: Sequence[Tensor]) -> None:
        """h += the sum of the maps ``added``, or of the shortcut's convolution."""
        at = 0
        for x in added:
            if self.shortcut is None:
                h.add_(x)
            else:
                self.shortcut(x.permute(0, 2, 3, 1).reshape(-1, x.shape[1]), rows(h), slice(at, at + x.shape[1]))
            at += x.shape[1]

    def memory(self) -> int:
        return self.convolution.memory() + (0 if self.shortcut is None else self.shortcut.memory())


class Fused:
    """By the extension, in one pass (ops/convolution.py): nothing is joined or normalised in memory."""

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        kind: str,
        shortcut: Tensor | None,
        description: str,
    ) -> None:
        """``weight`` (out, in, 3, 3) and ``shortcut`` (out, also) float32; ``bias`` that of both."""
        self.out_channels, self.in_channels = weight.shape[:2]
        self.description, self.kind = description, kind
        self._has_data = type(weight) is Tensor  # ``explain`` has none
        self._packed = native.pack_convolution(weight, kind, dtype, shortcut) if self._has_data else weight
        self._bias, self.has_shortcut = bias, shortcut is not None

    def __call__(
        self, maps: Sequence[Tensor], norm: Norm | None = None, silu: bool = False, added: Sequence[Tensor] = ()
    ) -> Tensor:
        x, more = maps if len(maps) == 2 else (maps[0], None)
        if not self._has_data:
            return x.new_empty(len(x), self.out_channels, *native.result_size(x.shape[2], x.shape[3], self.kind))
        first, second = (*added, None, None)[:2]
        groups, eps, *of_norm = (0, 0.0, None, None, None, None) if norm is None else norm
        of_call = (self.out_channels, self.kind, groups, eps, silu, *of_norm, first, second, self.has_shortcut)
        return native.convolution(x, more, self._packed, self._bias, *of_call)

    def memory(self) -> int:
        return self._packed.nbytes + (0 if self._bias is None else self._bias.nbytes)


def fuses(device: torch.device, dtype: torch.dtype) -> tuple[bool, str]:
    """Whether convolutions are ``Fused``, and why: as ``layers.linear.native.products`` decides on products."""
    if device.type != "cpu" or dtype not in (torch.float32, torch.bfloat16):
        return False, f"{str(dtype).removeprefix('torch.')} on {device.type}"
    loaded, status = extension_status()
    choice = wanted()
    if not loaded:
        return False, f"msdd_fast._C {status}"
    if choice != "auto":
        return choice == "1", f"MSDD_FAST_NATIVE_LINEAR={choice}"
    level = cpu_level("linear_level")
    if level in MEASURED_LEVELS:
        return True, f"faster with {level}"
    return False, f"the extension's are not known to be faster with {level}"


def _fold(weight: Tensor, dim: int) -> Tensor:
    """Taps a, b, c along ``dim`` to c, b + c, a + b, a.

    With padding 1 and stride 2 the transposed convolution reads, for an even place, tap 3 at the pixel before and tap 1
    at its own; for an odd one tap 2 at its own and tap 0 at the pixel after.
    """
    a, b, c = weight.unbind(dim)
    return torch.stack([c, b + c, a + b, a], dim)


def repeated(x: Tensor, times: int) -> Tensor:
    """A map (B, C, H, W) with every pixel ``times`` times in both directions, channels-last."""
    b, c, height, width = x.shape
    cells = x.permute(0, 2, 3, 1)[:, :, None, :, None]
    wide = cells.expand(b, height, times, width, times, c).reshape(b, times * height, times * width, c)
    return wide.permute(0, 3, 1, 2)


def rows(x: Tensor) -> Tensor:
    """The pixels of a channels-last map (B, C, H, W) as rows (B * H * W, C), without a copy."""
    return x.permute(0, 2, 3, 1).view(-1, x.shape[1])


def as_map(x: Tensor, like: Tensor) -> Tensor:
    """Rows (B * H * W, C) as a channels-last map with the batch and sides of ``like``."""
    b, _, height, width = like.shape
    return x.view(b, height, width, -1).permute(0, 3, 1, 2)
