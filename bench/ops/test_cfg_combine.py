"""cfg_combine against torch.lerp, the same formula in one call."""

import torch

from msdd_fast import ops
from msdd_fast.bench.ops.suite import Case, Measure

SCALE = 1.5
BASELINES = {
    "plain": lambda v_cond, v_uncond, scale: v_uncond + SCALE * (v_cond - v_uncond),
    "lerp": lambda v_cond, v_uncond, scale: torch.lerp(v_uncond, v_cond, SCALE),
}


def test_cfg_combine(case: Case, measure: Measure) -> None:
    v_cond, v_uncond = case.image(), case.image()
    measure(ops.cfg_combine, (v_cond, v_uncond, case.scalar(SCALE)), bytes_moved=3 * v_cond.nbytes)
