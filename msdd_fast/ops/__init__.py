"""The fused ops: one file each with formula, eager reference and registration. Kernels have the same stem."""

from msdd_fast.backends import check_ops, environment_choice
from msdd_fast.ops.cfg_combine import cfg_combine
from msdd_fast.ops.cfg_euler import cfg_euler
from msdd_fast.ops.euler_step import euler_step
from msdd_fast.ops.renoise_upsample import renoise_upsample
from msdd_fast.ops.start_noise import start_noise

__all__ = ["cfg_combine", "cfg_euler", "euler_step", "renoise_upsample", "start_noise"]

check_ops(environment_choice(), __all__)
