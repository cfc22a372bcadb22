"""MSDD's decode with gradients, and the noise that it carries (docs/spec.md#sampler, docs/spec.md#renoise)."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from msdd_fast.diffusion.noise import renoise_noise, start_noise
from msdd_fast.diffusion.schedule import NUM_TIMESTEPS, StageSchedule
from msdd_fast.errors import ConfigError
from msdd_fast.families.msdd.decoder import Decoder
from msdd_fast.families.msdd.encoder import Encoder
from msdd_fast.ops.renoise_upsample import renoise_upsample_with
from msdd_fast.sampling import VelocityModel, velocity
from msdd_fast.tokenizer import Tokenizer


def msdd_parts(tokenizer: Tokenizer) -> tuple[Encoder, Decoder]:
    """Encoder and decoder. Raises ConfigError for a tokenizer of another family."""
    encoder, decoder = tokenizer.encoder, tokenizer.decoder
    if not isinstance(encoder, Encoder) or not isinstance(decoder, Decoder):
        raise ConfigError(f"tokenizer must be of the family msdd, got {tokenizer.config.family}")
    return encoder, decoder


def draw_noise(schedule: StageSchedule, image_size: int, seeds: Tensor) -> list[Tensor]:
    """The noise of a decode with ``seeds`` (B,), as ``sampling.sample`` takes it: (B, 3, H_s, H_s) per stage."""
    sizes = [image_size >> s for s in reversed(range(len(schedule)))]
    rho = schedule.config.block_correlation
    renoising = [renoise_noise(seeds, (3, r, r), s, rho) for s, r in enumerate(sizes) if s]
    return [start_noise(seeds, (3, sizes[0], sizes[0])), *renoising]


def unroll(
    decoder: VelocityModel,
    x: Tensor,
    z: Tensor,
    schedule: StageSchedule,
    noise: Sequence[Tensor],
    start: int = 0,
    steps: int = 1,
    cfg_scale: float = 1.0,
) -> list[Tensor]:
    """States at the end of stage ``start`` and of all later ones, from ``x``, the state at the beginning of ``start``.

    The sampler (docs/spec.md#sampler) in plain autograd; beta multiplies ``noise[s]`` before stage s > start.
    """
    states = []
    for stage in schedule.stages[start:]:
        if stage.index > start:
            x = renoise_upsample_with(x, stage.alpha, stage.beta, noise[stage.index])
        model_times, t = schedule.time_grid(stage.index, steps)
        for i in range(steps):
            v = velocity(decoder, x, model_times[i].to(x.device).expand(len(x)), z, cfg_scale, "eager")
            x = x + (t[i + 1] - t[i]).item() * v
        states.append(x)
    return states


def image_pyramid(images: Tensor, num_stages: int) -> list[Tensor]:
    """``num_stages`` + 1 resolutions by 2x2 box means, coarsest first."""
    levels = [images]
    for _ in range(num_stages):
        levels.append(F.avg_pool2d(levels[-1], 2))
    return levels[::-1]


def path_noise(schedule: StageSchedule, noise: Sequence[Tensor], stage: int) -> Tensor:
    """The noise in the state of a decode with ``noise`` at the start of ``stage``: (B, 3, H_s, H_s).

    The state is (1 - start_t) * image + start_t * this noise, which is upsampled and renoised like the image
    (docs/spec.md#renoise). For a block correlation of -1/3 it is white with unit variance.
    """
    n = noise[0]
    for before, here in zip(schedule.stages[:stage], schedule.stages[1 : stage + 1], strict=True):
        up = F.interpolate(n, scale_factor=2.0, mode="nearest")
        n = (here.alpha * before.end_t * up + here.beta * noise[here.index]) / here.start_t
    return n


def stage_of(schedule: StageSchedule, u: float) -> int:
    """The stage that contains timestep 1000 u: the i with T_max[i] >= 1000 u > T_max[i + 1]."""
    above = [s.index for s in schedule.stages if s.timestep_max >= NUM_TIMESTEPS * u]
    return above[-1]
