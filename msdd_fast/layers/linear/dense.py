"""Matrix products in the engine's own dtype."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from msdd_fast.backends import tuned
from msdd_fast.layers.linear.base import LinearBase, Swiglu, is_within
from msdd_fast.layers.linear.native import NativeLinear, products, size_of

_MULTIPLIERS = {"cpu": "products of the extension", "torch": "products of PyTorch"}


class DenseLinear(LinearBase):
    """Plain weights (out, in) in the engine's dtype; cuBLAS on a GPU, oneDNN, MKL or the extension on a CPU.

    The extension's product is taken for the sizes and numbers of rows for which it measured faster (``products``);
    weights are then in its layout, and in torch's too only where that is faster for other numbers of rows. It has the
    SwiGLU within.

    On a CPU, bfloat16 weights are laid out once the way oneDNN's product reads them, which it would else do at every
    call: the same bits, measured 1.05 to 1.1 times as fast with 1024 rows and 1.4 to 1.7 times with 16.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, swiglu: Swiglu | None = None, *, taken: set[str] | None = None
    ) -> None:
        """``taken``: the products to choose from, of "torch" and "cpu" (default: ``products(weight)``)."""
        super().__init__(weight, swiglu)
        self.bias, self.device = bias, weight.device
        taken, reason = products(weight) if taken is None else (taken, "as asked")
        self._within = is_within(swiglu)
        self.native = NativeLinear(weight, bias, self._within) if "cpu" in taken else None
        if self._within and taken == {"cpu"}:
            self.row_bytes = 0
        self.packed = "torch" in taken and can_pack(weight)
        self.weight: Tensor | None = None
        if self.packed:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
        elif "torch" in taken:
            self.weight = weight.t()
        self.description = f"{' or '.join(_MULTIPLIERS[t] for t in sorted(taken))}: {reason}"
        self._fastest = partial(tuned.fastest, "linear", weight.device, weight.dtype, size_of(weight))
        self._by_rows: dict[int, str | None] = {}

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        if self._within and self.native is not None and self._is_native(len(x)):
            return self.native(x, out)
        return super().__call__(x, out)

    def product(self, x: Tensor, out: Tensor | None) -> Tensor:
        if not self._within and self.native is not None and self._is_native(len(x)):
            return self.native(x, out)
        assert self.weight is not None
        if self.packed:
            y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
            return y if out is None else out.copy_(y)
        if self.bias is None:
            return torch.mm(x, self.weight, out=out)
        return torch.addmm(self.bias, x, self.weight, out=out)

    def _is_native(self, rows: int) -> bool:
        """Whether the extension's product is the faster for this number of rows; looked up once."""
        if self.weight is None:
            return True
        if rows not in self._by_rows:
            self._by_rows[rows] = self._fastest(rows)
        return self._by_rows[rows] == "cpu"

    def memory(self) -> int:
        own = 0 if self.native is None else self.native.memory()
        return own + sum(t.nbytes for t in (self.weight, None if own else self.bias) if t is not None)


def can_pack(weight: Tensor) -> bool:
    """Whether oneDNN takes this weight in a layout of its own. These operators are Inductor's, so they may be missing.

    ``explain`` builds linears of tensors without data, which have no other layout.
    """
    if weight.device.type != "cpu" or weight.dtype != torch.bfloat16 or type(weight) is not Tensor:
        return False
    known = all(hasattr(torch.ops.mkldnn, name) for name in ("_reorder_linear_weight", "_linear_pointwise"))
    return known and torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
