"""final_step against a plain Euler step and the change of layout."""

import torch

from msdd_fast import ops
from msdd_fast.bench.ops.suite import PATCH, Case, Measure
from msdd_fast.diffusion.patch_rows import unpatchify_rows

DT = -0.25
BASELINES = {"plain": lambda x, v, dt, patch_size, dtype: unpatchify_rows(torch.add(x, v, alpha=DT), patch_size)}


def test_final_step(case: Case, measure: Measure) -> None:
    x, v = case.randn(case.tokens, case.batch, 3 * PATCH**2), case.randn(case.tokens, case.batch, 3 * PATCH**2)
    measure(ops.final_step, (x, v, case.scalar(DT), PATCH, case.dtype), bytes_moved=3 * x.nbytes)
