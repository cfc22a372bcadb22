"""The C++ ``window_attention``."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from msdd_fast.layout import attention_result
from msdd_fast.native._call import Native, metadata, prepared, result_like


@Native
def window_attention(q: Tensor, k: Tensor, v: Tensor, table: Tensor, height: int, width: int) -> Callable[..., Tensor]:
    """Attention over the window around each of height * width pixels; memory order of ``layout.attention_result(q)``.

    q, k, v (B, N, heads, d): one dtype, any strides but the last, which is 1. table (2w - 1, 2w - 1, heads), any
    strides.
    """
    out = result_like(attention_result(q))
    operands = metadata("q", q), metadata("k", k), metadata("v", v), metadata("table", table)
    return prepared("window_attention", out, out.metadata(), *operands, height, width)
