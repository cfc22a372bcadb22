"""The C++ ``qk_norm_rope``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from msdd_fast.layout import empty_tokens
from msdd_fast.native._call import Native, metadata, optional_metadata, prepared, result_like


@Native
def qk_norm_rope(
    qkv: Tensor, weight: Tensor, bias: Tensor | None, cos: Tensor, sin: Tensor | None, split: int, eps: float
) -> Callable[..., Tensor]:
    """(B, N, P - 1, H, d), dense in the order of qkv (B, N, P, H, d), from the leading parts of qkv.

    The inner (P, H, d) of qkv is contiguous; weight and bias (S, P - 1, d), cos and sin float32 (N, d / 2), all
    contiguous; S is 2 if ``split`` < N. RMSNorm if bias is None. weight and bias in 16 bits are widened at every call.
    """
    out = result_like(empty_tokens(qkv, qkv.shape[2] - 1, *qkv.shape[3:]))
    of_weight = metadata("weight", weight.float())
    of_bias = None if bias is None else metadata("bias", bias.float())
    angles = metadata("cos", cos), optional_metadata("sin", sin)
    call = prepared("qk_norm_rope", out, out.metadata(), metadata("qkv", qkv), of_weight, of_bias, *angles, split, eps)
    tables = 1 if bias is None else 2
    if all(t is None or t.dtype == torch.float32 for t in (weight, bias)):
        return call
    return lambda qkv, *rest: call(qkv, *[t.float() for t in rest[:tables]], *rest[tables:])
