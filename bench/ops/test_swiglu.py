"""swiglu of the image tokens of msdd-d12, on the halves of one packed tensor, against silu and a product."""

from msdd_fast import ops
from msdd_fast.bench.ops.suite import Case, Measure
from msdd_fast.ops.swiglu import swiglu_eager

HIDDEN = 2048
BASELINES = {"plain": swiglu_eager}


def test_swiglu(case: Case, measure: Measure) -> None:
    a, b = case.randn(case.batch * case.tokens, 2 * HIDDEN).chunk(2, dim=1)
    measure(ops.swiglu, (a, b), bytes_moved=3 * a.nbytes)
