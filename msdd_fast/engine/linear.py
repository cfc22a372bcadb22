"""The matrix products of the engine: rows (R, in) to rows (R, out), written where the caller wants them."""

from __future__ import annotations

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
    """Plain weights (out, in) in the engine's dtype; cuBLAS on a GPU, oneDNN or MKL on a CPU."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight_t, self.bias = weight.t(), bias
        self.out_features = weight.shape[0]

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        if self.bias is None:
            return torch.mm(x, self.weight_t, out=out)
        return torch.addmm(self.bias, x, self.weight_t, out=out)

    def memory(self) -> int:
        return sum(t.nbytes for t in (self.weight_t, self.bias) if t is not None)
