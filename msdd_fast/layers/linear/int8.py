"""Matrix products in int8 on CPUs: oneDNN's, with a scale for each row of weights and activations."""

from __future__ import annotations

import torch
from torch import Tensor

from msdd_fast.ops.quantize_rows import TINY

DESCRIPTION = "int8 weights, activations in 7 bits, a scale per row; first and last linears exact"
LEVELS = 63.0
ZERO_POINT = 64


class Int8Linear:
    """y = (q_x q_w^T) * scale_x * scale_w + b.

    The weight (out, in) is rounded to int8, -127 to 127, once. Each row of x (R, in) is divided by its largest
    magnitude at every call and rounded to 127 levels about 64, so that oneDNN sees one scale for all. Not to 255:
    without VNNI it adds two products in 16 bits, which would saturate. The product in float32 gets its row's scale and
    the bias in one pass. torch has no other int8 product that takes rows: ``_int_mm`` is 25 times slower than float32
    on AVX2, ``quantized.linear_dynamic`` has one scale for all of x (and is to be removed).
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        weight = weight.float()
        self.scale = weight.abs().amax(dim=1).clamp_min(TINY) / 127
        q = (weight / self.scale[:, None]).round().to(torch.int8)
        self.packed = torch.ops.onednn.qlinear_prepack(q, None)
        self.zeros = weight.new_zeros(len(weight), dtype=torch.int32)
        self.bias = weight.new_zeros(len(weight)) if bias is None else bias.float()
        self.offset = weight.new_tensor(ZERO_POINT + 0.5)  # conversion to integers cuts off
        self.out_features = len(weight)

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        rows = x.float()
        amax = rows.abs().amax(dim=1, keepdim=True).clamp_min_(TINY)
        q = torch.addcmul(self.offset, rows, LEVELS / amax).to(torch.uint8)
        scale, zero = 1 / LEVELS, ZERO_POINT
        weight = (self.packed, self.scale, self.zeros)
        y = torch.ops.onednn.qlinear_pointwise(q, scale, zero, *weight, None, 1.0, 0, torch.float32, "none", [], "")
        out = x.new_empty(len(x), self.out_features) if out is None else out
        return torch.addcmul(self.bias, y, amax, out=out)

    def memory(self) -> int:
        return self.out_features * 12 + self.packed.numel()


def available() -> tuple[bool, str]:
    """Whether oneDNN multiplies int8 matrices here, and why not. Tries it."""
    try:
        Int8Linear(torch.ones(16, 16, device="cpu"), None)(torch.ones(2, 16, device="cpu"))
    except (RuntimeError, AttributeError) as error:
        return False, f"int8 needs oneDNN's product (x86), which does not run here: {str(error).splitlines()[0]}"
    return True, "int8"
