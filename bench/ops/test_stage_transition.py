"""stage_transition to the case's scale against plain PyTorch on the image (other normals: moments are compared).

The baseline does the same work: Euler step, interpolate, randn made block-correlated, axpy, and the two changes of
layout that patch rows ask of it.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from msdd_fast import ops
from msdd_fast.bench.ops.suite import PATCH, Case, Measure
from msdd_fast.bench.timing.harness import same_moments
from msdd_fast.diffusion.patch_rows import patchify, unpatchify_rows

DT, ALPHA, BETA, STAGE, CORRELATION = -0.25, 0.6, 0.7, 1, -1.0 / 3.0


def plain(x: Tensor, v: Tensor, *_: Any) -> Tensor:
    end = unpatchify_rows(torch.add(x, v, alpha=DT), PATCH)
    up = F.interpolate(end, scale_factor=2.0, mode="nearest")
    eps = torch.randn_like(up)
    mean = F.interpolate(F.avg_pool2d(eps, 2), scale_factor=2.0, mode="nearest")
    return patchify(torch.add(ALPHA * up, eps - mean, alpha=BETA * (4 / 3) ** 0.5), PATCH)


BASELINES = {"plain": plain}


def test_stage_transition(case: Case, measure: Measure) -> None:
    shape = (case.tokens // 4, case.batch, 3 * PATCH**2)
    x, v = case.randn(*shape), case.randn(*shape)
    scalars = (case.scalar(DT), case.scalar(ALPHA), case.scalar(BETA), case.seeds())
    inputs = (x, v, *scalars, STAGE, PATCH, CORRELATION)
    measure(ops.stage_transition, inputs, bytes_moved=6 * x.nbytes, check={"plain": same_moments})
