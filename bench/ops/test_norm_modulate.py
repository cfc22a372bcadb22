"""norm_modulate of the image tokens of msdd-d12, a table row per image, against LayerNorm and two pointwise ops."""

from msdd_fast import ops
from msdd_fast.bench.ops.suite import Case, Measure
from msdd_fast.bench.timing.harness import FLOAT32_SLACK, ROUNDING
from msdd_fast.ops.norm_modulate import norm_modulate_eager

WIDTH = 768
BASELINES = {"plain": norm_modulate_eager}


def test_norm_modulate(case: Case, measure: Measure) -> None:
    x = case.randn(case.batch, case.tokens, WIDTH)
    shift, scale = (0.1 * case.randn(case.batch, 6 * WIDTH)).chunk(6, dim=1)[:2]
    # The plain steps round four times, values up to 8.
    tolerance = 4 * ROUNDING[case.dtype] * 8 + FLOAT32_SLACK
    measure(ops.norm_modulate, (x, shift, scale, None), bytes_moved=2 * x.nbytes, tolerance=tolerance)
