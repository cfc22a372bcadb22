"""Reading and writing PiD's released weights (docs/spec.md#pid-released). Names are the same here, after ``net.``.

Shapes show the sizes, but not the padding of the convolutions, the reference of the rotary angles, the upscaling, the
cells that a latent is unpacked into, nor whether weights are distilled; of 16 channels not even whose latents they are.
``variant`` names all of that.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from msdd_fast.errors import CheckpointError, InputError, MsddFastError
from msdd_fast.families.base import Option, Released, ReleasedFormat, read_released, strip_prefixes
from msdd_fast.families.pid.config import PiDConfig
from msdd_fast.families.pid.presets import PID_PRESETS

PREFIX = "net."
EMA_PREFIX = "net_ema."
# What full training checkpoints hold besides: other networks, and heads that only training reads.
_OTHER_NETWORKS = ("fake_score.", "discriminator.", "repa_loss.")
_TRAINING_ONLY = "lq_proj.lq_aux_rgb_head."
_FIRST_CONVOLUTION = "lq_proj.latent_proj.0.weight"
VARIANTS: dict[str, PiDConfig] = {
    name.removeprefix("pid-"): config for name, config in PID_PRESETS.items() if config.decoder.depth == 14
}
# Where the shape of the first convolution, (width, channels), leaves one kind of released weights.
_BY_SHAPE = {
    (512, 4): "sdxl",
    (512, 128): "flux2",
    (512, 768): "dinov2",
    (512, 1152): "siglip",
    (1024, 32): "v15-flux2",
}
_SAME_SHAPE = {(512, 16): ("flux", "sd3"), (1024, 16): ("v15-flux", "v15-qwenimage")}


def translate(state: object, variant: str | PiDConfig) -> tuple[PiDConfig, dict[str, Tensor], list[str]]:
    """Config, tensors under our names, and the names of what nothing reads; tensors may share memory with ``state``.

    Raises CheckpointError for what is no PiD decoder or not of the variant. Whether every tensor is there, and no
    other, is left to ``checkpoint.load_state``.
    """
    if not isinstance(state, dict) or not state or not all(isinstance(k, str) for k in state):
        raise CheckpointError(f"not a state dict: expected names mapped to tensors, got {type(state).__name__}")
    names = [re.sub(r"^((module|_orig_mod)\.)+", "", k) for k in state]
    if any(n.startswith("core.") or n.removeprefix(PREFIX) == "pos_embed" for n in names):
        raise CheckpointError("a PixelDiT checkpoint: it decodes no latents, and PiD is another network")
    if any(n.endswith((".weight_scale", ".comfy_quant")) for n in names):
        raise CheckpointError("weights in 8 bits, of which this library knows no format: take the bf16 file")
    twice = next((n for n, count in Counter(names).items() if count > 1), None)
    if twice is not None:
        raise CheckpointError(f"{twice} is there twice, once behind the name of a wrapper")
    tensors, unused = _network(dict(zip(names, state.values(), strict=True)))
    tensors = strip_prefixes(tensors)
    if not any(n.startswith("lq_proj.") for n in tensors):
        known = any(n.startswith("patch_blocks.") for n in tensors)
        reason = "it has no latent projection (lq_proj), as PiD's base model has none" if known else "no lq_proj"
        raise CheckpointError(f"not a PiD decoder: {reason}")
    return _config(tensors, variant), {f"decoder.{n}": t for n, t in tensors.items()}, unused


def _network(state: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The weights of the network without prefixes, of their moving average if there is one, and all other names."""
    prefix = next((p for p in (EMA_PREFIX, PREFIX) if any(n.startswith(p) for n in state)), "")
    chosen: dict[str, Any] = {}
    unused = []
    for name, tensor in state.items():
        short = name.removeprefix(prefix)
        is_other = name.startswith(_OTHER_NETWORKS) or (prefix == EMA_PREFIX and name.startswith(PREFIX))
        if is_other or short.startswith(_TRAINING_ONLY):
            unused.append(name)
        elif short in chosen:
            raise CheckpointError(f"{short} is there twice, once as {name}")
        else:
            chosen[short] = tensor
    return chosen, unused


def _config(tensors: dict[str, Tensor], variant: str | PiDConfig) -> PiDConfig:
    """The variant's config, after the first convolution is found to be its own."""
    if isinstance(variant, PiDConfig):
        return variant
    first = tensors.get(_FIRST_CONVOLUTION)
    shape = None if first is None or first.ndim != 4 else (first.shape[0], first.shape[1])
    fitting = _SAME_SHAPE.get(shape, (_BY_SHAPE[shape],) if shape in _BY_SHAPE else ()) if shape else ()
    if not variant:
        if len(fitting) != 1:
            raise InputError(
                f"variant must be named: {_FIRST_CONVOLUTION} {_shape(first)} is that of "
                f"{' and '.join(fitting) or 'no released weights'}; known: {', '.join(VARIANTS)}"
            )
        return VARIANTS[fitting[0]]
    if variant not in VARIANTS:
        raise InputError(f"variant must be one of {', '.join(VARIANTS)}, or a PiDConfig, got {variant!r}")
    if fitting and variant.removesuffix("-undistilled") not in fitting:
        raise CheckpointError(
            f"the weights are not of the variant {variant!r}: {_FIRST_CONVOLUTION} {_shape(first)} is that of "
            f"{' and '.join(fitting)}"
        )
    return VARIANTS[variant]


def _shape(tensor: Tensor | None) -> str:
    return "(missing)" if tensor is None else str(tuple(tensor.shape))


def load_released(source: str | os.PathLike[str] | Mapping[str, Any], variant: str | PiDConfig = "") -> Released:
    """Read PiD's released weights, or a full training checkpoint (docs/spec.md#pid-released).

    Args:
        source: a .safetensors or .pth file (nothing in it is executed), or a state dict; names with ``net.``,
            ``net_ema.`` (preferred) or bare.
        variant: one of ``VARIANTS`` ("flux", "v15-flux2", "v15-flux-undistilled", ...), or a config, for weights of
            other sizes. May be left out where the shapes leave only one, which is then taken to be distilled.

    Raises CheckpointError for a foreign or damaged file or one of another variant, InputError for an unknown variant.
    """
    name, state = read_released(source)
    try:
        config, tensors, unused = translate(state, variant)
    except InputError:
        raise
    except MsddFastError as e:
        raise CheckpointError(f"{name}: {e}") from e
    return Released(config, tensors, unused, name)


def release(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse: a tokenizer's state dict under the released names."""
    return {PREFIX + name.removeprefix("decoder."): tensor for name, tensor in tensors.items()}


RELEASED = ReleasedFormat(
    suffixes=(),
    load=load_released,
    options={
        "variant": Option("", "which released weights; needed where shapes do not tell", tuple(VARIANTS)),
    },
    export=release,
)
