"""euler_step against the expression of a plain sampler, and against PyTorch's axpy."""

import torch

from msdd_fast import ops
from msdd_fast.bench.ops.suite import Case, Measure

DT = -0.25
BASELINES = {
    "plain": lambda x, v, dt: x + DT * v,
    "axpy": lambda x, v, dt: torch.add(x, v, alpha=DT),
}


def test_euler_step(case: Case, measure: Measure) -> None:
    x, v = case.image(), case.image()
    measure(ops.euler_step, (x, v, case.scalar(DT)), bytes_moved=3 * x.nbytes)
