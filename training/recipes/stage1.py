"""Stage 1: multi-scale flow matching of encoder and decoder (docs/spec.md#stage1-loss)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from msdd_fast.commands.reconstruction import reconstruction_grid
from msdd_fast.diffusion.noise import start_noise
from msdd_fast.diffusion.schedule import NUM_TIMESTEPS, Stage
from msdd_fast.errors import ConfigError
from msdd_fast.tokenizer import Tokenizer
from msdd_fast.training.loop.draws import Draws, Purpose


@dataclass(frozen=True)
class Stage1Config:
    """The stage-1 objective. Defaults are the paper's where it says something."""

    time_distribution: Literal["lognormal", "uniform"] = "lognormal"
    """Within-stage time: sigmoid of a standard normal, or uniform."""
    start_fraction: float = 0.0
    """Share of the samples put at t = 1, the state that a one-step decode starts from."""
    sigmoid_weighting: bool = False
    """Weight exp(-3)/(t(1-t)) * sigmoid(2 logit(1-t) + 3) on the per-sample MSE."""
    context_dropout: float = 0.1
    """Probability of replacing the latent tokens by the null context (trains CFG)."""
    perceptual_weight: float = 0.0
    """Weight of the perceptual distance of the clean estimate, last stage only."""
    stages_per_image: int = 1
    """Stages that each image is trained on per step; the encoding is shared."""


def image_pyramid(images: Tensor, num_stages: int) -> list[Tensor]:
    """2x2 box means down from the full resolution, coarsest first; one level more than there are stages."""
    levels = [images]
    for _ in range(num_stages):
        levels.append(F.avg_pool2d(levels[-1], 2))
    return levels[::-1]


def stage_endpoints(coarse: Tensor, fine: Tensor, stage: Stage, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Noisy start and end of a stage: (1 - level) * x + level * noise.

    The end's image is ``fine`` (B, 3, H, H); the start's is ``coarse`` (B, 3, H/2, H/2) enlarged by nearest.
    """
    start = F.interpolate(coarse, scale_factor=2.0, mode="nearest")
    return (1 - stage.start_t) * start + stage.start_t * noise, (1 - stage.end_t) * fine + stage.end_t * noise


def time_weight(t: Tensor) -> Tensor:
    """The authors' sigmoid weighting; finite everywhere (t is kept 1e-3 away from 0 and 1)."""
    t = t.clamp(1.0 / NUM_TIMESTEPS, 1.0 - 1.0 / NUM_TIMESTEPS)
    log_ratio = torch.log((1 - t) / t)
    return torch.exp(torch.tensor(-3.0)) / (t * (1 - t)) * torch.sigmoid(2 * log_ratio + 3)


def sample_times(draws: Draws, config: Stage1Config, repeat: int = 0) -> Tensor:
    """Within-stage times (B,) on the grid 1.000, 0.999, ..., 0.001."""
    if config.time_distribution == "uniform":
        (u,) = draws.uniform(Purpose.TIME, variant=repeat)
    else:
        u = draws.normal(Purpose.TIME, variant=repeat).sigmoid()
    at_start = draws.uniform(Purpose.AT_START, variant=repeat)[0] < config.start_fraction
    u = torch.where(at_start, torch.zeros_like(u), u)
    return 1.0 - (u * NUM_TIMESTEPS).floor() / NUM_TIMESTEPS


def assign_stages(draws: Draws, num_stages: int, per_image: int) -> Tensor:
    """Stage labels (per_image, B): distinct for one image, each once among num_stages consecutive samples.

    So every process and micro-batch whose size is a multiple of num_stages has the same work at every scale.
    """
    label = draws.order(Purpose.STAGE, num_stages)
    return torch.stack([(label + r) % num_stages for r in range(per_image)])


def stage1_loss(
    tokenizer: Tokenizer,
    images: Tensor,
    config: Stage1Config,
    draws: Draws,
    perceptual: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of one batch of images (B, 3, R, R) in [-1, 1], a mean over its samples, and detached figures per stage.

    A figure is the vector of the samples' values, empty where the batch has none.
    """
    schedule, device, batch = tokenizer.schedule, images.device, len(images)
    z = tokenizer.encoder(images)
    pyramid = image_pyramid(images.float(), len(schedule))
    repeats = range(config.stages_per_image)
    labels = assign_stages(draws, len(schedule), config.stages_per_image).flatten()
    times = torch.cat([sample_times(draws, config, r) for r in repeats])
    nulls = torch.cat([draws.uniform(Purpose.NULL_CONTEXT, variant=r)[0] for r in repeats]) < config.context_dropout
    seeds = torch.cat([draws.seeds(Purpose.NOISE, r) for r in repeats])
    total = images.new_zeros((), dtype=torch.float32)
    figures: dict[str, Tensor] = {}
    if perceptual is not None and config.perceptual_weight > 0:
        figures["perceptual"] = images.new_zeros(0)
    for s in range(len(schedule)):
        index = (labels == s).nonzero().flatten()
        stage = schedule[s]
        resolution = pyramid[s + 1].shape[-1]
        figures[f"mse/{resolution}"] = images.new_zeros(0)
        if len(index) == 0:
            continue
        noise = start_noise(seeds[index].to(device), (3, resolution, resolution))
        model_time = schedule.round_model_time(
            stage.timestep_min + times[index] * (stage.timestep_max - stage.timestep_min)
        )
        t, image = times[index].to(device), (index % batch).to(device)
        start, end = stage_endpoints(pyramid[s][image], pyramid[s + 1][image], stage, noise)
        tt = t[:, None, None, None]
        x_t = (1 - tt) * end + tt * start
        v = tokenizer.decoder(x_t, model_time.to(device), z[image], nulls[index].to(device)).float()
        mse = (v - (start - end)).square().mean(dim=(1, 2, 3))
        weight = time_weight(t) if config.sigmoid_weighting else torch.ones_like(t)
        figures[f"mse/{resolution}"] = mse.detach()
        loss = weight * mse
        if perceptual is not None and config.perceptual_weight > 0 and s == len(schedule) - 1:
            distance = perceptual(x_t - tt * v, end)
            figures["perceptual"] = distance.detach()
            loss = loss + config.perceptual_weight * distance
        total = total + loss.sum() / labels.numel()
    return total, figures


class Stage1Recipe:
    """Stage 1 as a ``trainer.Recipe``; ``preview`` images (B, 3, R, R) appear in the sample pictures."""

    def __init__(
        self,
        config: Stage1Config,
        preview: Tensor | None = None,
        perceptual: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        if config.perceptual_weight > 0 and perceptual is None:
            raise ConfigError("perceptual_weight > 0 needs a perceptual distance; give its weights file")
        self.config, self.preview, self.perceptual = config, preview, perceptual

    def loss(self, tokenizer: Tokenizer, images: Tensor, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        return stage1_loss(tokenizer, images, self.config, draws, self.perceptual)

    def picture(self, tokenizer: Tokenizer) -> Image.Image | None:
        return None if self.preview is None else reconstruction_grid(tokenizer, self.preview)
