"""How much memory MSDD's tables and activations take."""

from __future__ import annotations

from collections.abc import Sequence

from msdd_fast.families.msdd.config import TokenizerConfig, swiglu_hidden_size
from msdd_fast.families.msdd.engine.tables import StageTables


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
