"""The C++ ``attention``."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from msdd_fast.layout import attention_result
from msdd_fast.native._call import Native, metadata, optional_metadata, prepared, result_like


@Native
def attention(
    q: Tensor, k: Tensor, v: Tensor, accumulate: Tensor | None = None, level: str = ""
) -> Callable[..., Tensor]:
    """softmax(q k^T / sqrt(d)) v, plus ``accumulate``, rounded once; memory order of ``layout.attention_result(q)``.

    q (B, Nq, H, d), k and v (B, Nk, H, d), accumulate like q: one dtype, any strides but the last, which is 1. Nothing
    is copied. Nk >= 1; d up to 128. ``level`` (attention.h) is for tests.
    """
    out = result_like(attention_result(q))
    operands = metadata("q", q), metadata("k", k), metadata("v", v), optional_metadata("accumulate", accumulate)
    return prepared("attention", out, out.metadata(), *operands, level)
