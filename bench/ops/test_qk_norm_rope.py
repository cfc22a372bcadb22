"""qk_norm_rope of the image tokens of msdd-d12, in one token-major buffer, against two LayerNorms and a rotation."""

import torch

from msdd_fast import ops
from msdd_fast.bench.ops.suite import Case, Measure
from msdd_fast.ops.qk_norm_rope import qk_norm_rope_eager

HEADS, HEAD_DIM = 12, 64
BASELINES = {"plain": qk_norm_rope_eager}


def test_qk_norm_rope(case: Case, measure: Measure) -> None:
    qkv = case.randn(case.tokens, case.batch, 3, HEADS, HEAD_DIM).transpose(0, 1)
    weight, bias = 1 + 0.1 * case.randn(1, 2, HEAD_DIM), 0.1 * case.randn(1, 2, HEAD_DIM)
    angle = torch.rand(case.tokens, HEAD_DIM // 2, device=case.device)
    inputs = (qkv, weight, bias, angle.cos(), angle.sin(), None)
    measure(ops.qk_norm_rope, inputs, bytes_moved=2 * 2 * qkv[:, :, 0].nbytes)
