"""How much memory MSDD's tables and activations take."""

from __future__ import annotations

from collections.abc import Sequence

from msdd_fast.families.msdd.config import TokenizerConfig
from msdd_fast.families.msdd.engine.network import Network
from msdd_fast.families.msdd.engine.tables import StageTables
from msdd_fast.layers.request import Request


def tables_memory(tables: Sequence[StageTables]) -> int:
    """Bytes of the modulation and position tables."""
    total = 0
    for stage in tables:
        total += sum(t.nbytes for t in stage.rope if t is not None)
        for step in stage.steps:
            vectors = [v for block in step.modulation.blocks for v in block]
            total += sum(v.nbytes for v in (*vectors, step.modulation.shift, step.modulation.scale))
    return total


def activation_bytes(network: Network, config: TokenizerConfig, request: Request) -> int:
    """Most bytes that a decode holds at once, its images included: at the last scale, whose blocks take most.

    Alive in a block besides the rows that came in and those of now: its norm, attention, MLP and result of the block
    before, with either q, k and v, the first two normalised, and what attends; or the MLP's hidden layer.
    """
    dec, w = config.decoder, network.w
    itemsize, batch = w.dtype.itemsize, request.shape[0] * (2 if request.guided else 1)
    width, length, tokens = dec.hidden_size * itemsize, config.num_latent_tokens, config.grid_size**2
    image = w.blocks[-1].streams[-1]
    assert image.gate_up is not None
    inner = image.gate_up.out_features * itemsize
    joint = dec.conditioning == "joint"
    rows = (tokens + length if joint else tokens) * batch
    attention = (11 if joint else 12) * width + inner + image.qkv.row_bytes
    hidden = 5 * width + 2 * inner + image.gate_up.row_bytes
    context = length * batch * width * (1 if joint else 3 * dec.depth)
    embedded = tokens * request.shape[0] * width if joint or request.guided else 0
    pixels = 3 * config.image_size**2 * request.shape[0] * itemsize
    return context + embedded + rows * max(attention, hidden) + pixels * 7 // 4
