"""gate_residual_norm_modulate of the image tokens of msdd-d12, a table row per image, against its plain steps."""

from msdd_fast import ops
from msdd_fast.bench.ops.suite import Case, Measure
from msdd_fast.bench.timing.harness import FLOAT32_SLACK, ROUNDING
from msdd_fast.ops.gate_residual_norm_modulate import gate_residual_norm_modulate_eager

WIDTH = 768
BASELINES = {"plain": gate_residual_norm_modulate_eager}


def test_gate_residual_norm_modulate(case: Case, measure: Measure) -> None:
    x, y = (case.randn(case.batch, case.tokens, WIDTH) for _ in range(2))
    gate, shift, scale = (0.1 * case.randn(case.batch, 6 * WIDTH)).chunk(6, dim=1)[:3]
    # The plain steps round six times, values up to 8.
    tolerance = 6 * ROUNDING[case.dtype] * 8 + FLOAT32_SLACK
    inputs = (x, y, gate, shift, scale, None)
    measure(ops.gate_residual_norm_modulate, inputs, bytes_moved=4 * x.nbytes, tolerance=tolerance)
