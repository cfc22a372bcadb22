"""euler_step on every backend against its formula in float64."""

from msdd_fast import ops
from tests.ops.pointwise import Pointwise


class TestEulerStep(Pointwise):
    op = staticmethod(ops.euler_step)
    names = ("x", "v")
    scalars = {"dt": -0.25}
    formula = staticmethod(lambda x, v, dt: x + dt * v)
