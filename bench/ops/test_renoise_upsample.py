"""renoise_upsample to the case's scale against interpolate, randn and axpy (white noise: moments are compared)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from msdd_fast import ops
from msdd_fast.bench.ops.suite import Case, Measure
from msdd_fast.bench.timing.harness import same_moments

ALPHA, BETA, STAGE, CORRELATION = 0.6, 0.7, 1, -1.0 / 3.0


def plain(x: Tensor, *_: Any) -> Tensor:
    up = F.interpolate(x, scale_factor=2.0, mode="nearest")
    return torch.add(ALPHA * up, torch.randn_like(up), alpha=BETA)


BASELINES = {"plain": plain}


def test_renoise_upsample(case: Case, measure: Measure) -> None:
    x = case.randn(case.batch, 3, case.scale // 2, case.scale // 2)
    inputs = (x, case.scalar(ALPHA), case.scalar(BETA), case.seeds(), STAGE, CORRELATION)
    measure(ops.renoise_upsample, inputs, bytes_moved=5 * x.nbytes, check={"plain": same_moments})
