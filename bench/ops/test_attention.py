"""attention of a joint block: 128 context tokens and the scale's image tokens, 12 heads of 64, views of the engine's
packed token-major buffer; against PyTorch's own call.
"""

import torch.nn.functional as F

from msdd_fast import ops
from msdd_fast.bench.ops.suite import Case, Measure

CONTEXT, HEADS, HEAD_SIZE = 128, 12, 64
BASELINES = {
    "F.sdpa": lambda q, k, v: F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2),
    "eager": lambda q, k, v: ops.attention(q, k, v, backend="eager"),
}


def test_attention(case: Case, measure: Measure) -> None:
    tokens = CONTEXT + case.tokens
    qkv = case.randn(tokens, case.batch, 3, HEADS, HEAD_SIZE).transpose(0, 1)
    flops = 4 * case.batch * HEADS * HEAD_SIZE * tokens**2
    measure(ops.attention, qkv.unbind(2), bytes_moved=4 * qkv.nbytes // 3, flops=flops)
