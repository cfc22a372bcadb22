"""Matrix products in float8 on NVIDIA GPUs: e4m3 weights and activations, a scale for each row of both."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from msdd_fast.layers.linear.base import LinearBase, Swiglu
from msdd_fast.ops.quantize_rows import quantize_rows_eager

MULTIPLE = 16
"""Of both sizes of a weight, says torch._scaled_mm."""
DESCRIPTION = "float8 (e4m3) weights and activations, a scale per row; first and last linears exact"


class Fp8Linear(LinearBase):
    """y = (q_x q_w^T) * scale_x * scale_w + b with q and scale of each row by ``ops.quantize_rows``.

    The weight (out, in) is quantised once; x (R, in) bfloat16 at every call by ``quantize``. The product is
    torch._scaled_mm: cuBLASLt on sm_90, CUTLASS on sm_89 and sm_100, with scales (R, 1) and (1, out) float32 and the
    weight in column-major order. Fast accumulation keeps fewer than 23 bits of a sum, far more than e4m3 does of its
    terms. A multiplication moves one byte for each weight.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        swiglu: Swiglu | None = None,
        *,
        quantize: Callable[[Tensor], tuple[Tensor, Tensor]],
    ) -> None:
        super().__init__(weight, swiglu)
        self.row_bytes += weight.shape[1]  # in 8 bits
        self.description = "float8 products of PyTorch: the fast tier"
        q, scale = quantize_rows_eager(weight)
        self.weight_t, self.scale = q.t(), scale.reshape(1, -1)
        self.bias, self.quantize = bias, quantize

    def product(self, x: Tensor, out: Tensor | None) -> Tensor:
        q, scale = self.quantize(x)
        # CUTLASS takes ``out`` for packed rows, whatever its strides.
        target = out if out is not None and out.is_contiguous() else x.new_empty(len(x), self.features)
        torch._scaled_mm(
            q,
            self.weight_t,
            scale_a=scale,
            scale_b=self.scale,
            bias=self.bias,
            out_dtype=x.dtype,
            use_fast_accum=True,
            out=target,
        )
        return target if out is None or out is target else out.copy_(target)

    def memory(self) -> int:
        return sum(t.nbytes for t in (self.weight_t, self.scale, self.bias) if t is not None)


def available(device: torch.device) -> tuple[bool, str]:
    """Whether ``device`` multiplies float8 matrices with row-wise scales, and why not. Tries it: some GPUs that should
    do not (sm_120 with cuBLAS of CUDA 13.0)."""
    if device.type != "cuda" or torch.version.hip:
        return False, f"float8 needs an NVIDIA GPU, the tokenizer is on {device}"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < (8, 9):
        return False, f"float8 needs sm_89 or newer (Ada, Hopper, Blackwell), this GPU is sm_{major}{minor}"
    try:
        example = torch.ones(MULTIPLE, MULTIPLE, dtype=torch.bfloat16, device=device)
        Fp8Linear(example, example[0], quantize=quantize_rows_eager)(example)
        torch.cuda.synchronize(device)
    except RuntimeError as error:
        return False, f"torch._scaled_mm with row-wise scales does not run on this GPU: {str(error).splitlines()[0]}"
    return True, "float8"


def unsuitable(name: str, weight: Tensor) -> str | None:
    """What keeps one weight (out, in) from float8."""
    if any(size % MULTIPLE for size in weight.shape):
        return f"{name} is {tuple(weight.shape)}, and float8 needs both sizes to be multiples of {MULTIPLE}"
    return None
