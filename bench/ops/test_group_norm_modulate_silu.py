"""group_norm_modulate_silu of the first level of an SSDD-S decoder, channels-last, with scale and shift at 1/8 of the
resolution (AdaGN), against PyTorch's GroupNorm, interpolation and pointwise operations.
"""

import torch

from msdd_fast import ops
from msdd_fast.bench.ops.suite import Case, Measure
from msdd_fast.bench.timing.harness import FLOAT32_SLACK, ROUNDING
from msdd_fast.ops.group_norm_modulate_silu import group_norm_modulate_silu_eager

CHANNELS, GROUPS = 64, 32
BATCH = {"cpu": 1, "cuda": 64}
BASELINES = {"plain": group_norm_modulate_silu_eager}


def test_group_norm_modulate_silu(case: Case, measure: Measure) -> None:
    x = case.randn(case.batch, CHANNELS, case.scale, case.scale).contiguous(memory_format=torch.channels_last)
    cells = 0.1 * case.randn(case.batch, case.scale // 8, case.scale // 8, 2 * CHANNELS)
    scale, shift = cells.permute(0, 3, 1, 2).chunk(2, dim=1)
    # The plain steps round five times, values up to 8; PyTorch's statistics of 131072 elements err by 1e-5.
    tolerance = 5 * ROUNDING[case.dtype] * 8 + 16 * FLOAT32_SLACK
    inputs = (x, GROUPS, 1e-5, None, None, scale, shift)
    measure(ops.group_norm_modulate_silu, inputs, bytes_moved=3 * x.nbytes, tolerance=tolerance)
