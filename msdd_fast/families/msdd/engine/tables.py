"""Everything that is constant once the times of all steps are known.

The adaLN vectors of every block are functions of the model time alone. A decode uses stages x steps model times, so the
adaLN matrices, a third of the network's bytes, become small tables; RoPE angles and schedule numbers likewise.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from msdd_fast.diffusion.rope import RopeTable
from msdd_fast.diffusion.schedule import StageSchedule
from msdd_fast.families.msdd.decoder import Decoder
from msdd_fast.families.msdd.mmdit import AdaLN, CrossBlock, JointBlock, Stream


class BlockModulation(NamedTuple):
    """Vectors of one block, each float32 (S, D): S = 2 (context, image) or 1 (image).

    In the last joint block the context has no queries: its ``shift_msa`` and ``scale_msa`` have S = 2, the rest S = 1.
    """

    shift_msa: Tensor
    scale_msa: Tensor
    gate_msa: Tensor
    shift_mlp: Tensor
    scale_mlp: Tensor
    gate_mlp: Tensor


class Modulation(NamedTuple):
    """All adaLN vectors of one evaluation of the network; ``shift`` and ``scale`` (1, D) of the final layer."""

    blocks: list[BlockModulation]
    shift: Tensor
    scale: Tensor


class Step(NamedTuple):
    """One Euler step: the network's vectors at its time, and dt < 0 as a float32 () tensor on the device.

    ``dt`` belongs to what ``Network.velocity`` returns, which is the velocity divided by ``gain``.
    """

    modulation: Modulation
    dt: Tensor
    gain: float


class StageTables(NamedTuple):
    """One scale: its steps, its position tables (context and image rows in one), alpha and beta of its renoising."""

    steps: list[Step]
    rope: RopeTable
    alpha: Tensor
    beta: Tensor


@torch.no_grad()
def modulation_at(decoder: Decoder, time: Tensor, device: torch.device) -> Modulation:
    """adaLN vectors at one model time (), computed in float32 from the decoder's own weights."""
    embed = decoder.time_embed
    c = time.reshape(1).to(next(embed.parameters()).device)
    features = embed.features(c)
    first, _, second = embed.mlp
    c = F.silu(_linear(second, F.silu(_linear(first, features))))  # every AdaLN starts with the same SiLU
    blocks = []
    for block in decoder.blocks:
        if isinstance(block, JointBlock):
            context, image = _vectors(block.context, c), _vectors(block.image, c)
            joined = [torch.cat(pair) for pair in zip(context, image, strict=False)] + image[len(context) :]
        else:
            assert isinstance(block, CrossBlock)
            joined = _vectors(block.image, c)
        blocks.append(BlockModulation(*(v.to(device) for v in joined)))
    shift, scale = (v.to(device) for v in _adaln(decoder.final_layer.adaln, c))
    return Modulation(blocks, shift, scale)


def _vectors(stream: Stream, c: Tensor) -> list[Tensor]:
    assert stream.adaln is not None  # the decoder's streams are modulated
    return _adaln(stream.adaln, c)


def _adaln(adaln: AdaLN, c: Tensor) -> list[Tensor]:
    return list(_linear(adaln.linear, c).chunk(adaln.chunks, dim=1))


def _linear(linear: torch.nn.Module, x: Tensor) -> Tensor:
    assert isinstance(linear, torch.nn.Linear)
    return F.linear(x, linear.weight.float(), linear.bias.float())


def joint_rope(context: RopeTable, image: RopeTable) -> RopeTable:
    """One table for context rows then image rows. "cosine" rows are a rotation without its sine."""
    parts = (context, image)
    if all(p.sin is None for p in parts):
        return RopeTable(torch.cat([p.cos for p in parts]), None)
    sines = [torch.zeros_like(p.cos) if p.sin is None else p.sin for p in parts]
    return RopeTable(torch.cat([p.cos for p in parts]), torch.cat(sines))


@torch.no_grad()
def stage_tables(decoder: Decoder, schedule: StageSchedule, steps: int, device: torch.device) -> list[StageTables]:
    """Tables of every stage for ``steps`` Euler steps each."""
    config = decoder.config
    joint = config.decoder.conditioning == "joint"
    tables = []
    for stage in schedule.stages:
        times, t = schedule.time_grid(stage.index, steps)
        grid = config.stage_resolution(stage.index) // config.patch_size
        context, image = decoder.rope_tables(grid, device)
        velocity = config.decoder.prediction == "velocity"
        gains = torch.ones_like(times) if velocity else stage.velocity_gain(stage.within_stage_time(times))
        tables.append(
            StageTables(
                [
                    Step(modulation_at(decoder, time, device), _scalar(dt * gain, device), float(gain))
                    for time, dt, gain in zip(times, t.diff(), gains, strict=True)
                ],
                joint_rope(context, image) if joint else image,
                _scalar(stage.alpha, device),
                _scalar(stage.beta, device),
            )
        )
    return tables


def _scalar(value: float | Tensor, device: torch.device) -> Tensor:
    return torch.tensor(float(value), dtype=torch.float32, device=device)
