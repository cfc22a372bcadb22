"""cfg_euler on every backend against its formula in float64."""

from msdd_fast import ops
from tests.ops.pointwise import Pointwise


class TestCfgEuler(Pointwise):
    op = staticmethod(ops.cfg_euler)
    names = ("x", "v_cond", "v_uncond")
    scalars = {"scale": 1.7, "dt": -0.25}
    formula = staticmethod(lambda x, cond, uncond, scale, dt: x + dt * (uncond + scale * (cond - uncond)))
