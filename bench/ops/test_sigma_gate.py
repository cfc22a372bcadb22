"""sigma_gate of the image tokens of PiD, a gate per token, against a product, a sigmoid, pointwise ops and a norm."""

from msdd_fast import ops
from msdd_fast.bench.ops.suite import Case, Measure
from msdd_fast.bench.timing.harness import FLOAT32_SLACK, ROUNDING
from msdd_fast.ops.sigma_gate import sigma_gate_eager

WIDTH = 1536
BASELINES = {"plain": sigma_gate_eager}


def test_sigma_gate(case: Case, measure: Measure) -> None:
    x, y = case.randn(case.tokens * case.batch, WIDTH), case.randn(case.tokens * case.batch, WIDTH)
    shift, scale, rms_weight = 0.1 * case.randn(1, WIDTH), 0.1 * case.randn(1, WIDTH), 1 + 0.1 * case.randn(WIDTH)
    inputs = (x, y, case.randn(len(x), 1), shift, scale, rms_weight, None, WIDTH**-0.5 * case.randn(WIDTH))
    # The plain steps round six times, values up to 8; the logit's product too.
    tolerance = 8 * ROUNDING[case.dtype] * 8 + FLOAT32_SLACK
    measure(ops.sigma_gate, inputs, bytes_moved=4 * x.nbytes, tolerance=tolerance)
