"""The C++ ``attention``."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from msdd_fast.layout import attention_result
from msdd_fast.native._call import Native, entry, metadata, optional_metadata


@Native
def attention(
    q: Tensor, k: Tensor, v: Tensor, accumulate: Tensor | None = None, level: str = ""
) -> Callable[..., Tensor]:
    """softmax(q k^T / sqrt(d)) v, plus ``accumulate``, rounded once; memory order of ``layout.attention_result(q)``.

    q (B, Nq, H, d), k and v (B, Nk, H, d), accumulate like q: one dtype, any strides but the last, which is 1. Nothing
    is copied. Nk >= 1; d up to 128. ``level`` (attention.h) is for tests.
    """
    call = entry("attention")
    of_q, of_k, of_v = metadata("q", q), metadata("k", k), metadata("v", v)
    of_accumulate = optional_metadata("accumulate", accumulate)
    of_out = metadata("out", attention_result(q))

    def run(q: Tensor, k: Tensor, v: Tensor, accumulate: Tensor | None = None) -> Tensor:
        out = q.new_empty_strided(*of_out[1:])
        call(
            (out.data_ptr(), *of_out),
            (q.data_ptr(), *of_q),
            (k.data_ptr(), *of_k),
            (v.data_ptr(), *of_v),
            None if accumulate is None or of_accumulate is None else (accumulate.data_ptr(), *of_accumulate),
            level,
        )
        return out

    return run
