"""Reading and writing SSDD's released weights: sizes from shapes, and the sign of the velocity.

Names are the same here. Their network gives the image minus the noise, ours the noise minus the image: the last
convolution changes its sign on the way in and out (docs/spec.md#ssdd-network).
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from msdd_fast.diffusion.config import SamplingConfig
from msdd_fast.errors import CheckpointError, MsddFastError
from msdd_fast.families.base import Option, Released, ReleasedFormat, read_released, strip_prefixes
from msdd_fast.families.ssdd.config import KLEncoderConfig, SSDDConfig, UViTConfig

_NEGATED = ("decoder.conv_out.weight", "decoder.conv_out.bias")


def translate_ssdd(state: object, image_size: int, steps: int, groups: int) -> tuple[SSDDConfig, dict[str, Tensor]]:
    """Config and tensors under our names and in our convention; the tensors may share memory with ``state``.

    Raises CheckpointError for what is no SSDD tokenizer, ConfigError for sizes that no tokenizer can have. Whether
    every tensor is there, and no other, is left to ``checkpoint.load_state``.
    """
    if not isinstance(state, dict) or not state:
        raise CheckpointError(f"not a state dict: expected names mapped to tensors, got {type(state).__name__}")
    if not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise CheckpointError("not a state dict: expected names mapped to tensors")
    tensors = strip_prefixes(state)
    return _infer_config(tensors, image_size, steps, groups), _negate(tensors)


def release_ssdd(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse: a tokenizer's state dict as the authors' network would load it."""
    return _negate(tensors)


def _negate(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: -tensor if name in _NEGATED else tensor for name, tensor in tensors.items()}


def _infer_config(tensors: dict[str, Tensor], image_size: int, steps: int, groups: int) -> SSDDConfig:
    """Sizes from shapes. Each is what most of the tensors that show it say, so that one wrong tensor stands out."""

    def read(what: str, pattern: str, ndim: int, axis: int) -> int:
        matches = (t for name, t in tensors.items() if re.fullmatch(pattern, name) and t.ndim == ndim)
        sizes = Counter(t.shape[axis] for t in matches)
        if not sizes:
            raise CheckpointError(f"not an SSDD tokenizer: no tensor shows {what} (expected {pattern})")
        return sizes.most_common(1)[0][0]

    def count(prefix: str) -> int:
        found = {int(m[1]) for name in tensors if (m := re.match(rf"{re.escape(prefix)}\.(\d+)\.", name))}
        if not found or found != set(range(len(found))):
            raise CheckpointError(f"not an SSDD tokenizer: {prefix} are missing or not numbered from 0")
        return len(found)

    def width(level: int) -> int:
        where = rf"decoder\.(down_blocks\.{level}|up_blocks\.{3 - level})\.resnets\.\d\.norm2\.(weight|bias)"
        return read(f"the decoder's width at level {level}", where, 1, 0)

    blocks = "decoder.mid_block.transformer_blocks"
    table = rf"{re.escape(blocks)}\.\d+\.relative_position_bias\.relative_bias_table"
    gaussian = read("the number of latent channels", r"encoder\.(conv_out|out_proj)\.(weight|bias)", 1, 0)
    return SSDDConfig(
        image_size=image_size,
        factor=2 ** (count("encoder.down") - 1),
        latent_channels=gaussian // 2,  # means and log-variances
        encoder=KLEncoderConfig(read("the encoder's width", r"encoder\.down\.0\.block\.\d\.\w+\.bias", 1, 0)),
        decoder=UViTConfig(
            widths=(width(0), width(1), width(2), width(3)),
            mid_layers=count(blocks),
            heads=read("the number of heads", table, 3, 2),
            window=(read("the window", table, 3, 0) + 1) // 2,
            groups=groups,
        ),
        sampling=SamplingConfig(steps=steps),
    )


def load_released(
    source: str | os.PathLike[str] | Mapping[str, Any], image_size: int = 256, steps: int = 8, groups: int = 32
) -> Released:
    """Read SSDD's released weights (docs/spec.md#ssdd-network).

    Args:
        source: a .safetensors file, a .pt file (loaded with ``weights_only=True``), or a state dict with the names
            ``encoder.*`` and ``decoder.*``. ``module.`` and ``_orig_mod.`` prefixes are tolerated.
        image_size: side of the crops that the command line takes; the network takes any multiple of 8.
        steps: that ``decode`` takes by default: 1 for distilled weights.
        groups: of the decoder's GroupNorms, the only size that no shape shows; 32 in all released weights.

    Raises CheckpointError for a foreign or damaged file.
    """
    name, state = read_released(source)
    try:
        config, tensors = translate_ssdd(state, image_size, steps, groups)
    except MsddFastError as e:
        raise CheckpointError(f"{name}: {e}") from e
    return Released(config, tensors, [], name)


RELEASED = ReleasedFormat(
    suffixes=(".safetensors",),
    load=load_released,
    options={"image_size": Option(256, "pixels per side"), "steps": Option(8, "steps of a decode, 1 if distilled")},
    export=release_ssdd,
)
