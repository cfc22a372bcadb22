"""The fused ops: one file each with formula, eager reference and registration. Kernels have the same stem.

``__all__`` lists the ops; ``get_op`` and ``observe`` are for those who register backends or watch which are taken.
``Ops`` is their type as one object, which an engine's network and program call.
"""

from typing import Final

from msdd_fast.ops._registry import get_op as get_op
from msdd_fast.ops._registry import observe as observe
from msdd_fast.ops.attention import attention
from msdd_fast.ops.cfg_combine import cfg_combine
from msdd_fast.ops.cfg_euler import cfg_euler
from msdd_fast.ops.context_attention import context_attention
from msdd_fast.ops.convolution import convolution
from msdd_fast.ops.euler_step import euler_step
from msdd_fast.ops.final_step import final_step
from msdd_fast.ops.gate_residual_norm_modulate import gate_residual_norm_modulate
from msdd_fast.ops.geglu import geglu
from msdd_fast.ops.group_norm_modulate_silu import group_norm_modulate_silu
from msdd_fast.ops.linear import linear
from msdd_fast.ops.norm_modulate import norm_modulate
from msdd_fast.ops.pixel_block import pixel_block
from msdd_fast.ops.pixel_modulate import pixel_modulate
from msdd_fast.ops.qk_norm_rope import qk_norm_rope
from msdd_fast.ops.quantize_rows import quantize_rows
from msdd_fast.ops.renoise_upsample import renoise_upsample
from msdd_fast.ops.sde_step import sde_step
from msdd_fast.ops.sigma_gate import sigma_gate
from msdd_fast.ops.stage_transition import stage_transition
from msdd_fast.ops.start_noise import start_noise
from msdd_fast.ops.swiglu import swiglu
from msdd_fast.ops.window_attention import window_attention

__all__ = [
    "attention",
    "cfg_combine",
    "cfg_euler",
    "context_attention",
    "convolution",
    "euler_step",
    "final_step",
    "gate_residual_norm_modulate",
    "geglu",
    "group_norm_modulate_silu",
    "linear",
    "norm_modulate",
    "pixel_block",
    "pixel_modulate",
    "qk_norm_rope",
    "quantize_rows",
    "renoise_upsample",
    "sde_step",
    "sigma_gate",
    "stage_transition",
    "start_noise",
    "swiglu",
    "window_attention",
]


class Ops:
    """Every op as a method, for ``engine.bound_ops.bind``, which fixes the backend: a call passes no ``backend``."""

    attention: Final = staticmethod(attention)
    cfg_combine: Final = staticmethod(cfg_combine)
    cfg_euler: Final = staticmethod(cfg_euler)
    context_attention: Final = staticmethod(context_attention)
    convolution: Final = staticmethod(convolution)
    euler_step: Final = staticmethod(euler_step)
    final_step: Final = staticmethod(final_step)
    gate_residual_norm_modulate: Final = staticmethod(gate_residual_norm_modulate)
    geglu: Final = staticmethod(geglu)
    group_norm_modulate_silu: Final = staticmethod(group_norm_modulate_silu)
    linear: Final = staticmethod(linear)
    norm_modulate: Final = staticmethod(norm_modulate)
    pixel_block: Final = staticmethod(pixel_block)
    pixel_modulate: Final = staticmethod(pixel_modulate)
    qk_norm_rope: Final = staticmethod(qk_norm_rope)
    quantize_rows: Final = staticmethod(quantize_rows)
    renoise_upsample: Final = staticmethod(renoise_upsample)
    sde_step: Final = staticmethod(sde_step)
    sigma_gate: Final = staticmethod(sigma_gate)
    stage_transition: Final = staticmethod(stage_transition)
    start_noise: Final = staticmethod(start_noise)
    swiglu: Final = staticmethod(swiglu)
    window_attention: Final = staticmethod(window_attention)
