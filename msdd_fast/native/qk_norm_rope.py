"""The C++ ``qk_norm_rope``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from msdd_fast.layout import empty_tokens
from msdd_fast.native._call import Native, entry, metadata, optional_metadata


@Native
def qk_norm_rope(
    qkv: Tensor, weight: Tensor, bias: Tensor | None, cos: Tensor, sin: Tensor | None, split: int, eps: float
) -> Callable[..., Tensor]:
    """(B, N, P - 1, H, d), dense in the order of qkv (B, N, P, H, d), from the leading parts of qkv.

    The inner (P, H, d) of qkv is contiguous; weight and bias (S, P - 1, d), cos and sin float32 (N, d / 2), all
    contiguous; S is 2 if ``split`` < N. RMSNorm if bias is None. weight and bias in 16 bits are widened at every call.
    """
    _, _, parts, heads, d = qkv.shape
    call = entry("qk_norm_rope")
    of_out, of_qkv = metadata("out", empty_tokens(qkv, parts - 1, heads, d)), metadata("qkv", qkv)
    widen = weight.dtype != torch.float32 or (bias is not None and bias.dtype != torch.float32)
    has_bias, of_weight = bias is not None, metadata("weight", weight.float())
    of_bias = None if bias is None else metadata("bias", bias.float())
    of_cos, of_sin = metadata("cos", cos), optional_metadata("sin", sin)

    def run(qkv: Tensor, weight: Tensor, *rest: Tensor) -> Tensor:
        bias, (cos, *sin) = (rest[0], rest[1:]) if has_bias else (None, rest)
        if widen:
            weight, bias = weight.float(), None if bias is None else bias.float()
        out = qkv.new_empty_strided(*of_out[1:])
        call(
            (out.data_ptr(), *of_out),
            (qkv.data_ptr(), *of_qkv),
            (weight.data_ptr(), *of_weight),
            None if bias is None or of_bias is None else (bias.data_ptr(), *of_bias),
            (cos.data_ptr(), *of_cos),
            None if of_sin is None else (sin[0].data_ptr(), *of_sin),
            split,
            eps,
        )
        return out

    return run
