"""context_attention of a cross block: the scale's image tokens over 128 context tokens, added to the image's
self-attention, 12 heads of 64, views of the engine's packed token-major buffers; against PyTorch's own call and a sum.
"""

import torch.nn.functional as F
from torch import Tensor

from msdd_fast import ops
from msdd_fast.bench.ops.suite import Case, Measure

CONTEXT, HEADS, HEAD_SIZE = 128, 12, 64


def sdpa(q: Tensor, k: Tensor, v: Tensor, accumulate: Tensor) -> Tensor:
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return accumulate + out.transpose(1, 2)


BASELINES = {"F.sdpa": sdpa, "eager": lambda *arguments: ops.context_attention(*arguments, backend="eager")}


def test_context_attention(case: Case, measure: Measure) -> None:
    q, accumulate = case.randn(case.tokens, case.batch, 2, HEADS, HEAD_SIZE).transpose(0, 1).unbind(2)
    k, v = case.randn(CONTEXT, case.batch, 2, HEADS, HEAD_SIZE).transpose(0, 1).unbind(2)
    flops = 4 * case.batch * HEADS * HEAD_SIZE * case.tokens * CONTEXT
    measure(ops.context_attention, (q, k, v, accumulate), bytes_moved=3 * q.nbytes + 2 * k.nbytes, flops=flops)
