"""The matrix products of the engine: rows (R, in) to rows (R, out), written where the caller wants them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from msdd_fast.backends import tuned
from msdd_fast.layers.linear.native import NativeLinear, products, size_of


class Linear(Protocol):
    """y = x W^T + b of rows. ``out`` may be a slice of columns or rows of a larger buffer."""

    out_features: int

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor: ...

    def memory(self) -> int:
        """Bytes of the weights."""
        ...


class DenseLinear:
    """Plain weights (out, in) in the engine's dtype; cuBLAS on a GPU, oneDNN, MKL or the extension on a CPU.

    The extension's product is taken for the sizes and numbers of rows for which it measured faster (``products``);
    weights are then in its layout, and in torch's too only where that is faster for other numbers of rows.

    On a CPU, bfloat16 weights are laid out once the way oneDNN's product reads them, which it would else do at every
    call: the same bits, measured 1.05 to 1.1 times as fast with 1024 rows and 1.4 to 1.7 times with 16.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, taken: set[str] | None = None) -> None:
        """``taken``: the products to choose from, of "torch" and "cpu" (default: ``products(weight)``)."""
        self.bias, self.out_features, self.device = bias, weight.shape[0], weight.device
        taken = products(weight) if taken is None else taken
        self.native = NativeLinear(weight, bias) if "cpu" in taken else None
        self.packed = "torch" in taken and can_pack(weight)
        self.weight: Tensor | None = None
        if self.packed:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
        elif "torch" in taken:
            self.weight = weight.t()
        self._fastest = partial(tuned.fastest, "linear", weight.device, weight.dtype, size_of(weight))
        self._by_rows: dict[int, str | None] = {}

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        if self.native is not None and (self.weight is None or self._product(len(x)) == "cpu"):
            return self.native(x, out)
        assert self.weight is not None
        if self.packed:
            y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
            return y if out is None else out.copy_(y)
        if self.bias is None:
            return torch.mm(x, self.weight, out=out)
        return torch.addmm(self.bias, x, self.weight, out=out)

    def _product(self, rows: int) -> str | None:
        """The faster product for this number of rows, looked up once."""
        if rows not in self._by_rows:
            self._by_rows[rows] = self._fastest(rows)
        return self._by_rows[rows]

    def memory(self) -> int:
        packed = None if self.native is None else self.native.packed
        return sum(t.nbytes for t in (self.weight, packed, self.bias) if t is not None)


def can_pack(weight: Tensor) -> bool:
    """Whether oneDNN takes this weight in a layout of its own. These operators are Inductor's, so they may be missing.

    ``explain`` builds linears of tensors without data, which have no other layout.
    """
    if weight.device.type != "cpu" or weight.dtype != torch.bfloat16 or type(weight) is not Tensor:
        return False
    known = all(hasattr(torch.ops.mkldnn, name) for name in ("_reorder_linear_weight", "_linear_pointwise"))
    return known and torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


MakeLinear = Callable[[Tensor, Tensor | None], Linear]
