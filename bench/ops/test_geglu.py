"""geglu of SSDD-S, whose feed-forward has an inner width of 640, on the halves of one packed tensor, against gelu and a
product.
"""

from msdd_fast import ops
from msdd_fast.bench.ops.suite import Case, Measure
from msdd_fast.ops.geglu import geglu_eager

HIDDEN = 640
BASELINES = {"plain": geglu_eager}


def test_geglu(case: Case, measure: Measure) -> None:
    value, gate = case.randn(case.batch * case.tokens, 2 * HIDDEN).chunk(2, dim=1)
    measure(ops.geglu, (value, gate), bytes_moved=3 * value.nbytes)
