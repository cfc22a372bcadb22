"""Stage 1: multi-scale flow matching of encoder and decoder (SPEC A5)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from msdd_fast.errors import ConfigError
from msdd_fast.models.tokenizer import Tokenizer
from msdd_fast.reconstruct import reconstruction_grid
from msdd_fast.schedule import NUM_TIMESTEPS, Stage


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


def sample_times(count: int, config: Stage1Config, generator: torch.Generator) -> Tensor:
    """Within-stage times (count,) on the grid 1.000, 0.999, ..., 0.001."""
    if config.time_distribution == "uniform":
        u = torch.rand(count, generator=generator)
    else:
        u = torch.randn(count, generator=generator).sigmoid()
    at_start = torch.rand(count, generator=generator) < config.start_fraction
    u = torch.where(at_start, torch.zeros_like(u), u)
    return 1.0 - (u * NUM_TIMESTEPS).floor() / NUM_TIMESTEPS


def assign_stages(batch: int, num_stages: int, per_image: int, generator: torch.Generator) -> Tensor:
    """Stage labels (per_image, batch): near-equal numbers per stage, distinct stages for one image."""
    label = torch.arange(batch)[torch.randperm(batch, generator=generator)] % num_stages
    return torch.stack([(label + r) % num_stages for r in range(per_image)])


def stage1_loss(
    tokenizer: Tokenizer,
    images: Tensor,
    config: Stage1Config,
    generator: torch.Generator,
    perceptual: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of one batch of images (B, 3, R, R) in [-1, 1], and detached figures per stage.

    ``generator`` is a CPU generator: the draws do not depend on the device.
    """
    schedule, device, batch = tokenizer.schedule, images.device, len(images)
    z = tokenizer.encoder(images)
    pyramid = image_pyramid(images.float(), len(schedule))
    labels = assign_stages(batch, len(schedule), config.stages_per_image, generator)
    total = images.new_zeros((), dtype=torch.float32)
    figures: dict[str, Tensor] = {}
    for s in range(len(schedule)):
        index = torch.cat([(row == s).nonzero().flatten() for row in labels])
        if len(index) == 0:
            continue
        stage = schedule[s]
        resolution = pyramid[s + 1].shape[-1]
        noise = torch.randn(len(index), 3, resolution, resolution, generator=generator).to(device)
        t_cpu = sample_times(len(index), config, generator)
        null = torch.rand(len(index), generator=generator) < config.context_dropout
        model_time = schedule.round_model_time(stage.timestep_min + t_cpu * (stage.timestep_max - stage.timestep_min))
        t, index_d = t_cpu.to(device), index.to(device)
        start, end = stage_endpoints(pyramid[s][index_d], pyramid[s + 1][index_d], stage, noise)
        tt = t[:, None, None, None]
        x_t = (1 - tt) * end + tt * start
        v = tokenizer.decoder(x_t, model_time.to(device), z[index_d], null.to(device)).float()
        mse = (v - (start - end)).square().mean(dim=(1, 2, 3))
        weight = time_weight(t) if config.sigmoid_weighting else torch.ones_like(t)
        share = len(index) / labels.numel()
        loss = (weight * mse).mean()
        figures[f"mse/{resolution}"] = mse.detach().mean()
        if perceptual is not None and config.perceptual_weight > 0 and s == len(schedule) - 1:
            distance = perceptual(x_t - tt * v, end).mean()
            figures["perceptual"] = distance.detach()
            loss = loss + config.perceptual_weight * distance
        total = total + share * loss
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

    def loss(
        self, tokenizer: Tokenizer, images: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return stage1_loss(tokenizer, images, self.config, generator, self.perceptual)

    def picture(self, tokenizer: Tokenizer) -> Image.Image | None:
        return None if self.preview is None else reconstruction_grid(tokenizer, self.preview)
