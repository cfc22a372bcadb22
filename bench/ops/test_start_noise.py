"""start_noise against torch.randn: other normals, so only their moments are compared."""

import torch

from msdd_fast import ops
from msdd_fast.bench.ops.suite import Case, Measure
from msdd_fast.bench.timing.harness import same_moments

BASELINES = {"plain": lambda seeds, shape, dtype: torch.randn(len(seeds), *shape, dtype=dtype, device=seeds.device)}


def test_start_noise(case: Case, measure: Measure) -> None:
    shape = (3, case.scale, case.scale)
    written = case.batch * 3 * case.scale**2 * case.dtype.itemsize
    measure(ops.start_noise, (case.seeds(), shape, case.dtype), bytes_moved=written, check={"plain": same_moments})
