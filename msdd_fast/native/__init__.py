"""The C++ functions of ``msdd_fast._C`` on tensors; ``cuda`` has the CUDA kernels.

Only marshalling: the ops (``msdd_fast.ops``) check arguments, and the extension refuses whatever would leave a tensor.
A function that takes results and arguments in the op's order needs no file here: ``_call.in_order`` makes it.
"""

from msdd_fast.native.attention import attention
from msdd_fast.native.cfg_euler import cfg_euler
from msdd_fast.native.convolution import convolution, pack_convolution, result_size
from msdd_fast.native.final_step import final_step
from msdd_fast.native.gate_residual_norm_modulate import gate_residual_norm_modulate
from msdd_fast.native.group_norm_modulate_silu import group_norm_modulate_silu
from msdd_fast.native.linear import linear, pack_linear
from msdd_fast.native.linear_int8 import linear_int8, pack_linear_int8
from msdd_fast.native.norm_modulate import norm_modulate
from msdd_fast.native.qk_norm_rope import qk_norm_rope
from msdd_fast.native.renoise_upsample import renoise_upsample
from msdd_fast.native.sde_step import sde_step
from msdd_fast.native.stage_transition import stage_transition
from msdd_fast.native.start_noise import start_noise
from msdd_fast.native.swiglu import swiglu
from msdd_fast.native.to_pixels import to_pixels
from msdd_fast.native.window_attention import window_attention

__all__ = [
    "attention",
    "cfg_euler",
    "convolution",
    "final_step",
    "gate_residual_norm_modulate",
    "group_norm_modulate_silu",
    "linear",
    "linear_int8",
    "norm_modulate",
    "pack_convolution",
    "pack_linear",
    "pack_linear_int8",
    "qk_norm_rope",
    "renoise_upsample",
    "result_size",
    "sde_step",
    "stage_transition",
    "start_noise",
    "swiglu",
    "to_pixels",
    "window_attention",
]
