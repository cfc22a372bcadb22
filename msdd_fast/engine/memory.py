"""How much memory an engine needs, and which batch sizes fit."""

from __future__ import annotations

from collections.abc import Sequence

from msdd_fast.config import SSDDConfig, TokenizerConfig
from msdd_fast.engine.tables import StageTables
from msdd_fast.errors import InputError
from msdd_fast.models.mmdit import swiglu_hidden_size


def tables_memory(tables: Sequence[StageTables]) -> int:
    """Bytes of the modulation and position tables."""
    total = 0
    for stage in tables:
        total += sum(t.nbytes for t in stage.rope if t is not None)
        for step in stage.steps:
            vectors = [v for block in step.modulation.blocks for v in block]
            total += sum(v.nbytes for v in (*vectors, step.modulation.shift, step.modulation.scale))
    return total


def activation_bytes(config: TokenizerConfig, itemsize: int, guided: bool, quantized: bool = False) -> int:
    """Upper bound on the bytes of one image's activations at the last scale.

    Alive at once at most: the residual stream twice, qkv (3D) with its normalised q and k (2D), attention (2D), or the
    MLP's input, [w1 | w3] (2I) and its product (I); besides, the state, the velocity and the image. ``quantized``
    linears also have the widest input (I) and output (2I or 3D) in float32.
    """
    dec = config.decoder
    inner = swiglu_hidden_size(dec.hidden_size, dec.mlp_multiple_of)
    per_token = 2 * dec.hidden_size + max(7 * dec.hidden_size, dec.hidden_size + 3 * inner)
    tokens, context = config.grid_size**2, config.num_latent_tokens
    if dec.conditioning == "joint":
        per_image = (tokens + context) * per_token
    else:
        per_image = tokens * per_token + context * dec.depth * 5 * dec.hidden_size
    if quantized:
        per_token = (inner + max(2 * inner, 3 * dec.hidden_size)) * 4 // itemsize
        per_image += (tokens + context) * per_token
    images = 3 * 3 * config.image_size**2
    return (per_image * (2 if guided else 1) + images) * itemsize + 3 * config.image_size**2 * 4


def ssdd_activation_bytes(config: SSDDConfig, itemsize: int) -> int:
    """Upper bound on the bytes of one image's activations of an SSDD decoder, without what convolutions take inside.

    Alive at once at most: all skips and the latents' part of the first convolution; in the last level's first residual
    block its input, that normalised, and two results; besides, the modulations, state, velocity and image.
    """
    widths, pixels = config.decoder.widths, config.image_size**2
    skips = sum((2 * w + (widths[max(0, i - 1)])) * pixels // 4**i for i, w in enumerate(widths))
    last = 2 * (widths[1] + widths[0]) + 2 * widths[0]
    ins = [sum(widths) * 4, sum(w + max(w, below) for w, below in zip(widths, (*widths[1:], 0), strict=True)) * 3]
    cells = (2 * sum(ins) + 2 * widths[3] * config.decoder.mid_layers) * pixels // 64
    return (skips + (widths[0] + last) * pixels + cells) * itemsize + 4 * 3 * pixels * 4


def fit(sizes: Sequence[int], max_memory: int | None, fixed: int, per_image: int) -> tuple[tuple[int, ...], list[str]]:
    """The batch sizes that fit in ``max_memory`` bytes, and what to say of the others.

    Raises InputError if none does.
    """
    if max_memory is None:
        return tuple(sizes), []
    fitting = tuple(s for s in sizes if fixed + s * per_image <= max_memory)
    if not fitting:
        needed = fixed + min(sizes) * per_image
        raise InputError(
            f"max_memory must be at least {needed} bytes (weights and tables {fixed}, batch {min(sizes)} "
            f"{min(sizes) * per_image}), got {max_memory}"
        )
    dropped = [s for s in sizes if s not in fitting]
    notes = [f"batch sizes {', '.join(map(str, dropped))} do not fit in max_memory={max_memory}"] if dropped else []
    return fitting, notes
