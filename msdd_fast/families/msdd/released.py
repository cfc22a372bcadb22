"""Reading checkpoints of the MSDD authors' code (docs/spec.md#authors-checkpoint): names, sizes and dead tensors."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from msdd_fast.diffusion.config import ScheduleConfig
from msdd_fast.errors import CheckpointError, InputError, MsddFastError
from msdd_fast.families.base import Option, Released, ReleasedFormat, read_released, strip_prefixes
from msdd_fast.families.msdd.config import (
    DecoderConfig,
    EncoderConfig,
    TokenizerConfig,
    authors_choices,
    swiglu_hidden_size,
)

_log = logging.getLogger(__name__)
_MLP_MULTIPLE = 256

# Parts of a name that are spelt differently here.
_RENAMES = (
    (r"^quant_conv\.", "encoder.final_layer."),
    (r"\bjoint_blocks\.", "blocks."),
    (r"\bcontext_block\.", "context."),
    (r"\bx_block\.", "image."),
    (r"\battn\.(qkv|proj)\.", r"\1."),
    (r"\battn\.ln_([qk])\.", r"\1_norm."),
    (r"\badaLN_modulation\.1\.", "adaln.linear."),
    (r"^(encoder|decoder)\.x_embedder\.proj\.", r"\1.patch_embed."),
    (r"^decoder\.t_embedder\.", "decoder.time_embed."),
    (r"^decoder\.context_embedder\.", "decoder.context_embed."),
    (r"^encoder\.register$", "encoder.registers"),
    (r"^encoder\.final_layer\.linear\.", "encoder.head."),
)
# Tensors that the authors store but never use.
_UNUSED_ENCODER = re.compile(r"encoder\.(t_embedder|context_embedder)\.")
# Stored as parameters, never trained, always zero: the encoder's disabled modulation.
_ZERO = re.compile(r"encoder\.(blocks\.\d+\.(context|image)|final_layer)\.(shift|scale)$")


def translate_authors(
    data: dict[str, Any], weights: str, image_size: int, num_stages: int
) -> tuple[TokenizerConfig, dict[str, Tensor], list[str]]:
    """Config, tensors under our names, and the names of the unused ones.

    Raises InputError for a bad ``weights``, CheckpointError for tensors that are no MSDD tokenizer.
    """
    state = strip_prefixes(_select_weights(data, weights))
    config = _infer_config(state, image_size, num_stages)
    depths = {"encoder": config.encoder.depth, "decoder": config.decoder.depth}
    tensors: dict[str, Tensor] = {}
    unused: list[str] = []
    for original, tensor in state.items():
        name = original
        for pattern, replacement in _RENAMES:
            name = re.sub(pattern, replacement, name)
        if _ZERO.match(name):
            if tensor.any():
                raise CheckpointError(f"{original} must be zero (the encoder has no modulation), got other values")
            unused.append(original)
        elif _UNUSED_ENCODER.match(name):
            unused.append(original)
        elif name in tensors:  # quant_conv is the same module as encoder.final_layer
            if not torch.equal(tensors[name], tensor):
                raise CheckpointError(f"quant_conv must equal its alias encoder.final_layer, but {original} differs")
        else:
            _place(name, original, tensor, depths, tensors, unused)
    unused.sort()
    _log.info("%d unused tensors dropped: %s", len(unused), ", ".join(unused))
    return config, tensors, unused


def _place(
    name: str, original: str, tensor: Tensor, depths: dict[str, int], tensors: dict[str, Tensor], unused: list[str]
) -> None:
    """Store one tensor; in the stream that ends in the last block only keys and values are alive."""
    dead_stream = {"encoder": "image", "decoder": "context"}
    match = re.match(r"(encoder|decoder)\.blocks\.(\d+)\.(context|image)\.(.+)", name)
    if match is None or int(match[2]) != depths[match[1]] - 1 or match[3] != dead_stream[match[1]]:
        tensors[name] = tensor
    elif match[4].startswith("qkv.") and tensor.ndim:
        prefix = name[: -len(match[4])]
        tensors[prefix + match[4].replace("qkv.", "kv.")] = tensor[len(tensor) // 3 :].clone()
        unused.append(f"{original}[:{len(tensor) // 3}]")
    elif match[4].startswith(("q_norm.", "proj.", "norm2.", "mlp.")):
        unused.append(original)
    else:
        tensors[name] = tensor


def _select_weights(data: dict[str, Any], weights: str) -> dict[str, Tensor]:
    if weights not in ("ema", "model"):
        raise InputError(f"weights must be 'ema' or 'model', got {weights!r}")
    if "model" in data or "ema" in data:
        state = data.get(weights)
        if not isinstance(state, dict):
            other = "model" if weights == "ema" else "ema"
            raise CheckpointError(f"no {weights!r} weights in the checkpoint; try weights={other!r}")
    else:
        state = data
    if not state or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise CheckpointError("not a state dict: expected names mapped to tensors")
    return state


def _infer_config(state: dict[str, Tensor], image_size: int, num_stages: int) -> TokenizerConfig:
    def shape(name: str, ndim: int) -> torch.Size:
        if name not in state:
            raise CheckpointError(f"not an MSDD tokenizer: tensor {name} is missing")
        if state[name].ndim != ndim:
            raise CheckpointError(f"tensor {name} must have {ndim} dimensions, got {tuple(state[name].shape)}")
        return state[name].shape

    _, num_tokens, _ = shape("encoder.register", 3)
    latent_dim = shape("decoder.context_embedder.weight", 2)[1]
    patch = shape("decoder.x_embedder.proj.weight", 4)[2]

    def network(side: str) -> dict[str, Any]:
        width = shape(f"{side}.x_embedder.proj.weight", 4)[0]
        inner = shape(f"{side}.joint_blocks.0.context_block.mlp.w1.weight", 2)[0] if _depth(state, side) > 1 else None
        if inner is not None and inner != swiglu_hidden_size(width, _MLP_MULTIPLE):
            raise CheckpointError(f"{side}: MLP width {inner} is not the authors' rule for hidden size {width}")
        head_dim = shape(f"{side}.joint_blocks.0.context_block.attn.ln_k.weight", 1)[0]
        return dict(depth=_depth(state, side), hidden_size=width, head_dim=head_dim, mlp_multiple_of=_MLP_MULTIPLE)

    return authors_choices(
        TokenizerConfig(
            image_size=image_size,
            patch_size=patch,
            num_latent_tokens=num_tokens,
            latent_dim=latent_dim,
            encoder=EncoderConfig(**network("encoder")),
            decoder=DecoderConfig(**network("decoder")),
            schedule=ScheduleConfig(num_stages=num_stages),
        )
    )


def _depth(state: dict[str, Tensor], side: str) -> int:
    blocks = {int(m[1]) for n in state if (m := re.match(rf"{side}\.joint_blocks\.(\d+)\.", n))}
    if not blocks or blocks != set(range(len(blocks))):
        raise CheckpointError(f"not an MSDD tokenizer: {side}.joint_blocks are missing or not numbered from 0")
    return len(blocks)


def load_released(
    source: str | os.PathLike[str] | Mapping[str, Any], weights: str = "ema", image_size: int = 256, num_stages: int = 4
) -> Released:
    """Read a checkpoint of the authors' code (docs/spec.md#authors-checkpoint).

    Args:
        source: a .pt file (loaded with ``weights_only=True``; nothing in it can run), its dict, or a bare state dict.
            ``module.`` and ``_orig_mod.`` prefixes are tolerated.
        weights: "ema" or "model": which of the two sets of a full checkpoint.
        image_size, num_stages: not stored in the weights; every other size is read off the tensors.

    The config has the authors' choices (``config.authors_choices``). Raises CheckpointError for a foreign, damaged or
    contradictory file.
    """
    name, data = read_released(source)
    if not isinstance(data, dict):
        raise CheckpointError(f"{name} must hold a dict, got {type(data).__name__}")
    try:
        return Released(*translate_authors(data, weights, image_size, num_stages), name)
    except InputError:
        raise
    except MsddFastError as e:
        raise CheckpointError(f"{name}: {e}") from e


RELEASED = ReleasedFormat(
    suffixes=(".pt", ".pth"),
    load=load_released,
    options={
        "weights": Option("ema", "which weights", ("ema", "model")),
        "image_size": Option(256, "pixels per side"),
        "num_stages": Option(4, "scales of the decoder"),
    },
    export=None,
)
