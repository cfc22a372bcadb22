"""What is constant in SSDD once the times of all steps are known: time enters the second norm of each residual block.

GN(h) weight + bias, times (1 + scale(t)), plus shift(t), is a norm with weight (1 + scale) and bias (1 + scale) +
shift. So the time embedding and a matrix of every residual block, 7 % of the weights of SSDD-M, become two vectors per
block and step.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msdd_fast.diffusion.schedule import StageSchedule
from msdd_fast.diffusion.sinusoids import sinusoids
from msdd_fast.families.ssdd.decoder import TIME_SCALE, UViTDecoder
from msdd_fast.families.ssdd.engine.weights import res_blocks


class SSDDStep(NamedTuple):
    """One Euler step: weight and bias (Cout,) of every residual block's second norm, and dt < 0, float32 ()."""

    norms: list[tuple[Tensor, Tensor]]
    dt: Tensor


@torch.no_grad()
def ssdd_steps(decoder: UViTDecoder, schedule: StageSchedule, steps: int, device: torch.device) -> list[SSDDStep]:
    """Computed in float32 from the decoder's own weights."""
    times, t = schedule.time_grid(0, steps)
    embed = decoder.time_embedding
    result = []
    for i in range(steps):
        time = times[i].reshape(1).to(embed.linear_1.weight.device)
        features = sinusoids(TIME_SCALE * time, embed.linear_1.in_features)
        te = F.silu(_linear(embed.linear_2, F.silu(_linear(embed.linear_1, features))))
        norms = []
        for block in res_blocks(decoder):
            scale, shift = _linear(block.time_emb_proj, te)[0].chunk(2)
            weight, bias = block.norm2.weight.float() * (1 + scale), block.norm2.bias.float() * (1 + scale) + shift
            norms.append((weight.to(device), bias.to(device)))
        dt = torch.tensor(float(t[i + 1] - t[i]), dtype=torch.float32, device=device)
        result.append(SSDDStep(norms, dt))
    return result


def _linear(linear: nn.Linear, x: Tensor) -> Tensor:
    assert linear.bias is not None
    return F.linear(x, linear.weight.float(), linear.bias.float())
