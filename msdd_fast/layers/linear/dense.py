"""The matrix products of the engine: rows (R, in) to rows (R, out), written where the caller wants them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor


class Linear(Protocol):
    """y = x W^T + b of rows. ``out`` may be a slice of columns or rows of a larger buffer."""

    out_features: int

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor: ...

    def memory(self) -> int:
        """Bytes of the weights."""
        ...


class DenseLinear:
    """Plain weights (out, in) in the engine's dtype; cuBLAS on a GPU, oneDNN or MKL on a CPU.

    On a CPU, bfloat16 weights are laid out once the way oneDNN's product reads them, which it would else do at every
    call: the same bits, measured 1.05 to 1.1 times as fast with 1024 rows and 1.4 to 1.7 times with 16.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.packed, self.bias = _can_pack(weight), bias
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous()) if self.packed else weight.t()
        self.out_features = weight.shape[0]

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        if self.packed:
            y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
            return y if out is None else out.copy_(y)
        if self.bias is None:
            return torch.mm(x, self.weight, out=out)
        return torch.addmm(self.bias, x, self.weight, out=out)

    def memory(self) -> int:
        return sum(t.nbytes for t in (self.weight, self.bias) if t is not None)


def _can_pack(weight: Tensor) -> bool:
    """Whether oneDNN takes this weight in a layout of its own. These operators are Inductor's, so they may be missing.

    ``explain`` builds linears of tensors without data, which have no other layout.
    """
    if weight.device.type != "cpu" or weight.dtype != torch.bfloat16 or type(weight) is not Tensor:
        return False
    known = all(hasattr(torch.ops.mkldnn, name) for name in ("_reorder_linear_weight", "_linear_pointwise"))
    return known and torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


MakeLinear = Callable[[Tensor, Tensor | None], Linear]
