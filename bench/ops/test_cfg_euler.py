"""cfg_euler against the guided step of a plain sampler, and against torch.lerp with PyTorch's axpy."""

import torch

from msdd_fast import ops
from msdd_fast.bench.ops.suite import Case, Measure

SCALE, DT = 1.5, -0.25
BASELINES = {
    "plain": lambda x, v_cond, v_uncond, scale, dt: x + DT * (v_uncond + SCALE * (v_cond - v_uncond)),
    "lerp+axpy": lambda x, v_cond, v_uncond, scale, dt: torch.add(x, torch.lerp(v_uncond, v_cond, SCALE), alpha=DT),
}


def test_cfg_euler(case: Case, measure: Measure) -> None:
    x, v_cond, v_uncond = case.image(), case.image(), case.image()
    inputs = (x, v_cond, v_uncond, case.scalar(SCALE), case.scalar(DT))
    measure(ops.cfg_euler, inputs, bytes_moved=4 * x.nbytes)
