"""cfg_combine on every backend against its formula in float64."""

from msdd_fast import ops
from tests.ops.pointwise import Pointwise


class TestCfgCombine(Pointwise):
    op = staticmethod(ops.cfg_combine)
    names = ("v_cond", "v_uncond")
    scalars = {"scale": 1.7}
    formula = staticmethod(lambda v_cond, v_uncond, scale: v_uncond + scale * (v_cond - v_uncond))
