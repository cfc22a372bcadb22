"""The C++ ``window_attention``."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from msdd_fast.layout import attention_result
from msdd_fast.native._call import Native, entry, metadata


@Native
def window_attention(q: Tensor, k: Tensor, v: Tensor, table: Tensor, height: int, width: int) -> Callable[..., Tensor]:
    """Attention over the window around each of height * width pixels; memory order of ``layout.attention_result(q)``.

    q, k, v (B, N, heads, d): one dtype, any strides but the last, which is 1. table (2w - 1, 2w - 1, heads), any
    strides.
    """
    call = entry("window_attention")
    of_q, of_k, of_v = metadata("q", q), metadata("k", k), metadata("v", v)
    of_table, of_out = metadata("table", table), metadata("out", attention_result(q))
    if not q.numel():
        return lambda q, *_: attention_result(q)

    def run(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
        out = q.new_empty_strided(*of_out[1:])
        call(
            (out.data_ptr(), *of_out),
            (q.data_ptr(), *of_q),
            (k.data_ptr(), *of_k),
            (v.data_ptr(), *of_v),
            (table.data_ptr(), *of_table),
            height,
            width,
        )
        return out

    return run
