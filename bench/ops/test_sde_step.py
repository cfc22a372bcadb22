"""sde_step with new noise, from the pixels of tokens, against making the noise, two pointwise steps and the change of
layout."""

from msdd_fast import ops
from msdd_fast.bench.ops.suite import Case, Measure
from msdd_fast.ops.sde_step import sde_step_eager

PATCH = 16
BASELINES = {"plain": sde_step_eager}


def test_sde_step(case: Case, measure: Measure) -> None:
    x, v = case.image(), case.randn((case.scale // PATCH) ** 2, case.batch, PATCH**2, 3)
    inputs = (x, v, case.scalar(0.866), case.scalar(0.634), case.seeds(), 1, None, PATCH, False)
    measure(ops.sde_step, inputs, bytes_moved=3 * x.nbytes)
