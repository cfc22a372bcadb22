"""Matrix products in int8 on CPUs, with a scale for each row of weights and activations: the extension's where the
processor multiplies bytes (AVX-512 VNNI, AMX), else oneDNN's."""

from __future__ import annotations

import torch
from torch import Tensor

from msdd_fast import native
from msdd_fast.backends.extension import cpu_level, extension_status
from msdd_fast.layers.linear.base import Linear, LinearBase, Swiglu, is_within
from msdd_fast.layers.linear.native import Plans, wanted
from msdd_fast.ops.quantize_rows import TINY

LEVELS = 63.0
ZERO_POINT = 64


class NativeInt8Linear(LinearBase):
    """y = (q_x q_w^T) * scale_x * scale_w + b by the extension, or the SwiGLU of its halves.

    The weight (out, in) is rounded once and each row of x (R, in) at every call, to -127 to 127 times a scale. Sums of
    products are exact; the rest is in float32, rounded once.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, swiglu: Swiglu | None = None) -> None:
        super().__init__(weight, swiglu)
        self.description = "int8 products of the extension: the fast tier"
        features, within = len(weight), is_within(swiglu)
        self._within, packed = within, native.pack_linear_int8(weight, within)
        if within:
            self.row_bytes = 0
        self._run = Plans(
            lambda x, out: native.linear_int8.prepare(x, packed, bias, features, within, out), packed, bias
        )

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        return self._run(x, out) if self._within else super().__call__(x, out)

    def product(self, x: Tensor, out: Tensor | None) -> Tensor:
        return self._run(x, out)

    def memory(self) -> int:
        """Bytes of weight and bias."""
        return self._run.memory()


class OneDnnInt8Linear(LinearBase):
    """y = (q_x q_w^T) * scale_x * scale_w + b by oneDNN.

    The weight (out, in) is rounded to int8, -127 to 127, once. Each row of x (R, in) is divided by its largest
    magnitude at every call and rounded to 127 levels about 64, so that oneDNN sees one scale for all. Not to 255:
    without VNNI it adds two products in 16 bits, which would saturate. The product in float32 gets its row's scale and
    the bias in one pass. torch has no other int8 product that takes rows: ``_int_mm`` is 25 times slower than float32
    on AVX2, ``quantized.linear_dynamic`` has one scale for all of x (and is to be removed).
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, swiglu: Swiglu | None = None) -> None:
        super().__init__(weight, swiglu)
        self.description = "int8 products of oneDNN: the fast tier"
        # The row in float32 and in 8 bits, and the result in float32.
        self.row_bytes += 5 * weight.shape[1] + 4 * len(weight)
        weight = weight.float()
        self.scale = weight.abs().amax(dim=1).clamp_min(TINY) / 127
        q = (weight / self.scale[:, None]).round().to(torch.int8)
        self.packed = torch.ops.onednn.qlinear_prepack(q, None)
        self.zeros = weight.new_zeros(len(weight), dtype=torch.int32)
        self.bias = weight.new_zeros(len(weight)) if bias is None else bias.float()
        self.offset = weight.new_tensor(ZERO_POINT + 0.5)  # conversion to integers cuts off

    def product(self, x: Tensor, out: Tensor | None) -> Tensor:
        rows = x.float()
        amax = rows.abs().amax(dim=1, keepdim=True).clamp_min_(TINY)
        q = torch.addcmul(self.offset, rows, LEVELS / amax).to(torch.uint8)
        scale, zero = 1 / LEVELS, ZERO_POINT
        weight = (self.packed, self.scale, self.zeros)
        y = torch.ops.onednn.qlinear_pointwise(q, scale, zero, *weight, None, 1.0, 0, torch.float32, "none", [], "")
        out = x.new_empty(len(x), self.features) if out is None else out
        return torch.addcmul(self.bias, y, amax, out=out)

    def memory(self) -> int:
        return self.features * 12 + self.packed.numel()


def is_native() -> bool:
    """Whether the extension multiplies: where it has instructions for bytes, unless MSDD_FAST_NATIVE_LINEAR=0."""
    return wanted() != "0" and extension_status()[0] and cpu_level("linear_int8_level") != "plain"


def int8_linear(weight: Tensor, bias: Tensor | None, swiglu: Swiglu | None = None) -> Linear:
    """The faster of the two here."""
    return (NativeInt8Linear if is_native() else OneDnnInt8Linear)(weight, bias, swiglu)


def description() -> str:
    """What the report says of the tier."""
    bits = "8 bits, the extension's products" if is_native() else "7 bits, oneDNN's products"
    return f"int8 weights, activations in {bits}, a scale per row; first and last linears exact"


def available(dtype: torch.dtype = torch.float32) -> tuple[bool, str]:
    """Whether an engine of ``dtype`` gains by int8 products here, and why not. Tries oneDNN."""
    if is_native():
        return True, "int8"
    if dtype == torch.bfloat16:
        return False, "oneDNN's int8 products measured half as fast as bfloat16's on CPUs that have both (Zen 4)"
    try:
        OneDnnInt8Linear(torch.ones(16, 16, device="cpu"), None)(torch.ones(2, 16, device="cpu"))
    except (RuntimeError, AttributeError) as error:
        return False, f"int8 needs oneDNN's product (x86), which does not run here: {str(error).splitlines()[0]}"
    return True, "int8"
