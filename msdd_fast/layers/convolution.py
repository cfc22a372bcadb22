"""The engine's convolutions: channels-last maps in, channels-last maps out; cuDNN on a GPU, oneDNN on a CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


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


def _fold(weight: Tensor, dim: int) -> Tensor:
    """Taps a, b, c along ``dim`` to c, b + c, a + b, a.

    With padding 1 and stride 2 the transposed convolution reads, for an even place, tap 3 at the pixel before and tap 1
    at its own; for an odd one tap 2 at its own and tap 0 at the pixel after.
    """
    a, b, c = weight.unbind(dim)
    return torch.stack([c, b + c, a + b, a], dim)


def channels_last(x: Tensor) -> Tensor:
    """``x``, copied only if it lies otherwise."""
    return x.contiguous(memory_format=torch.channels_last)


def rows(x: Tensor) -> Tensor:
    """The pixels of a channels-last map (B, C, H, W) as rows (B * H * W, C), without a copy."""
    return x.permute(0, 2, 3, 1).view(-1, x.shape[1])


def as_map(x: Tensor, like: Tensor) -> Tensor:
    """Rows (B * H * W, C) as a channels-last map with the batch and sides of ``like``."""
    b, _, height, width = like.shape
    return x.view(b, height, width, -1).permute(0, 3, 1, 2)
