"""MSDD, stage 1: multi-scale flow matching of encoder and decoder (docs/spec.md#stage1-loss)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from msdd_fast.diffusion.config import Config
from msdd_fast.diffusion.noise import start_noise
from msdd_fast.diffusion.schedule import NUM_TIMESTEPS, Stage
from msdd_fast.errors import CheckpointError, ConfigError
from msdd_fast.families import get_preset
from msdd_fast.families.msdd.config import TokenizerConfig
from msdd_fast.tokenizer import Tokenizer
from msdd_fast.training.config import Components, RunConfig
from msdd_fast.training.loop.draws import Draws, Purpose
from msdd_fast.training.loop.numbers import Range, check_numbers
from msdd_fast.training.loop.objective import Loss
from msdd_fast.training.losses.perceptual import require_perceptual
from msdd_fast.training.partial_start import take_what_fits
from msdd_fast.training.preview import stage_columns
from msdd_fast.training.recipes.msdd_one_step import OneStepConfig, one_step_loss
from msdd_fast.training.recipes.msdd_unroll import image_pyramid, msdd_parts


@dataclass(frozen=True)
class Stage1Config:
    """The stage-1 objective. Defaults are the paper's where it gives a value."""

    time_distribution: Literal["lognormal", "uniform"] = "lognormal"
    """Within-stage time: sigmoid of a standard normal, or uniform."""
    start_fraction: float = 0.0
    """Share of the samples at t = 1, where a one-step decode starts."""
    sigmoid_weighting: bool = False
    """Weight exp(-3)/(t(1-t)) * sigmoid(2 logit(1-t) + 3) on the per-sample MSE."""
    context_dropout: float = 0.1
    """Probability of replacing the latent tokens by the null context (trains CFG)."""
    perceptual_weight: float = 0.0
    """Weight of the perceptual distance of the clean estimate, last stage only."""
    stages_per_image: int = 1
    """Stages on which each image is trained per step; they share its encoding."""

    def __post_init__(self) -> None:
        check_numbers(
            self,
            start_fraction=Range(0, 1),
            context_dropout=Range(0, 1, open_high=True),
            perceptual_weight=Range(0),
            stages_per_image=Range(1, 64),
        )


def stage_endpoints(coarse: Tensor, fine: Tensor, stage: Stage, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Noisy start and end of a stage, (1 - level) * image + level * noise.

    The end is of ``fine`` (B, 3, H, H), the start of ``coarse`` (B, 3, H/2, H/2), upsampled by nearest neighbour.
    """
    start = F.interpolate(coarse, scale_factor=2.0, mode="nearest")
    return (1 - stage.start_t) * start + stage.start_t * noise, (1 - stage.end_t) * fine + stage.end_t * noise


def time_weight(t: Tensor) -> Tensor:
    """The authors' sigmoid weighting; finite everywhere, since t is clamped to [1e-3, 1 - 1e-3]."""
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
    """Stage labels (per_image, B): distinct for an image, and each once among ``num_stages`` consecutive samples.

    Every process and micro-batch whose size is a multiple of ``num_stages`` then has the same work at every scale.
    """
    label = draws.order(Purpose.STAGE, num_stages)
    return torch.stack([(label + r) % num_stages for r in range(per_image)])


def stage1_loss(
    tokenizer: Tokenizer,
    images: Tensor,
    config: Stage1Config,
    draws: Draws,
    perceptual: Callable[[Tensor, Tensor], Tensor] | None = None,
    z: Tensor | None = None,
) -> Loss:
    """Loss of images (B, 3, R, R) in [-1, 1], a mean over the samples. z: their latent tokens, if they are known.

    Its metrics are vectors of the samples' values, empty for a stage without samples.
    """
    schedule, device, batch = tokenizer.schedule, images.device, len(images)
    z = tokenizer.encoder(images) if z is None else z
    pyramid = image_pyramid(images.float(), len(schedule))
    repeats = range(config.stages_per_image)
    labels = assign_stages(draws, len(schedule), config.stages_per_image).flatten()
    times = torch.cat([sample_times(draws, config, r) for r in repeats])
    nulls = torch.cat([draws.uniform(Purpose.NULL_CONTEXT, variant=r)[0] for r in repeats]) < config.context_dropout
    seeds = torch.cat([draws.seeds(Purpose.NOISE, r) for r in repeats])
    total = images.new_zeros((), dtype=torch.float32)
    metrics: dict[str, Tensor] = {}
    if perceptual is not None and config.perceptual_weight > 0:
        metrics["perceptual"] = images.new_zeros(0)
    for s in range(len(schedule)):
        index = (labels == s).nonzero().flatten()
        stage = schedule[s]
        resolution = pyramid[s + 1].shape[-1]
        metrics[f"mse/{resolution}"] = images.new_zeros(0)
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
        metrics[f"mse/{resolution}"] = mse.detach()
        loss = weight * mse
        if perceptual is not None and config.perceptual_weight > 0 and s == len(schedule) - 1:
            distance = perceptual(x_t - tt * v, end)
            metrics["perceptual"] = distance.detach()
            loss = loss + config.perceptual_weight * distance
        total = total + loss.sum() / labels.numel()
    return Loss(total, metrics)


class Stage1Recipe:
    """Stage 1 as a ``loop.objective.Recipe``: flow matching, and a share of one-step decodes.

    Args:
        config: of the images that learn the flow.
        perceptual: needed when one of the two perceptual weights is above 0.
        one_step: of the images that are decoded; by default none are.

    Raises ConfigError if the perceptual distance is needed but missing.
    """

    def __init__(
        self,
        config: Stage1Config,
        perceptual: Callable[[Tensor, Tensor], Tensor] | None = None,
        one_step: OneStepConfig | None = None,
    ) -> None:
        self.config, self.perceptual, self.one_step = config, perceptual, one_step or OneStepConfig()
        require_perceptual(max(config.perceptual_weight, self.one_step.perceptual_weight), perceptual)

    def loss(self, tokenizer: Tokenizer, images: Tensor, draws: Draws) -> Loss:
        if self.one_step.share == 0:
            return stage1_loss(tokenizer, images, self.config, draws, self.perceptual)
        encoder, decoder = msdd_parts(tokenizer)
        z, schedule = encoder(images), tokenizer.schedule
        chosen = self.one_step.chosen(draws.samples)
        decoded, rest = chosen.nonzero().flatten(), (~chosen).nonzero().flatten()
        # Only images of the flow meet the null context, but DistributedDataParallel waits for all gradients everywhere.
        total = 0.0 * decoder.context_null.float().sum()
        # Every process logs the same names, whatever falls to its part of the batch.
        metrics = {name: images.new_zeros(0) for name in self.one_step.metrics(len(schedule))}
        if self.one_step.share < 1:
            flow = stage1_loss(tokenizer, images[rest], self.config, draws.of(rest), self.perceptual, z[rest])
            total, metrics = total + len(rest) * flow.value, metrics | flow.metrics
        if len(decoded):
            part, numbers = images[decoded], draws.of(decoded)
            loss = one_step_loss(decoder, schedule, part, z[decoded], self.one_step, numbers, self.perceptual)
            total, metrics = total + len(decoded) * loss.value, metrics | loss.metrics
        return Loss(total / len(images), metrics)

    def preview(self, tokenizer: Tokenizer, images: Tensor) -> list[Tensor]:
        """The clean estimate of every stage."""
        return stage_columns(tokenizer, images)


@dataclass(frozen=True)
class MSDDTrainConfig(RunConfig):
    """Flow matching of an MSDD tokenizer, encoder and decoder (docs/spec.md#stage1-loss)."""

    preset: str = "msdd-nano"
    """Model: a preset name."""
    start: str | None = None
    """Checkpoint to start from, instead of the preset with random weights: a bundled name, a directory or a hub id."""
    partial_start: bool = False
    """Keep the preset's model, and take from ``start`` the weights that fit it; the others are random."""
    image_size: int | None = None
    """Pixels per side, if not the model's."""
    num_stages: int | None = None
    """Scales, each at half the resolution of the next, if not the model's; 1 is single-scale flow matching."""
    objective: Stage1Config = field(default_factory=Stage1Config)
    one_step: OneStepConfig = field(default_factory=OneStepConfig)

    def model(self, base: Config | None = None) -> TokenizerConfig:
        """``base``, by default the preset, with this configuration's sizes. Raises ConfigError."""
        config = get_preset(self.preset) if base is None else base
        if not isinstance(config, TokenizerConfig):
            where = f"preset must be of the family msdd, got {self.preset}"
            raise ConfigError(where if base is None else f"start must be of the family msdd, got {self.start}")
        if self.image_size is not None:
            config = dataclasses.replace(config, image_size=self.image_size)
        if self.num_stages is not None:
            schedule = dataclasses.replace(config.schedule, num_stages=self.num_stages)
            config = dataclasses.replace(config, schedule=schedule)
        return config

    def build(self) -> Components:
        start = None if self.start is None else Tokenizer.from_pretrained(self.start)
        if self.partial_start and start is None:
            raise ConfigError("partial_start needs start, a checkpoint")
        config = self.model(None if start is None or self.partial_start else start.config)
        if self.objective.stages_per_image > config.schedule.num_stages:
            raise ConfigError(
                f"stages_per_image must be at most the model's {config.schedule.num_stages} stages, got "
                f"{self.objective.stages_per_image}"
            )
        weight = max(self.objective.perceptual_weight, self.one_step.perceptual_weight)
        recipe = Stage1Recipe(self.objective, self.perceptual_distance(weight), self.one_step)
        torch.manual_seed(self.loop.seed)
        if start is None:
            tokenizer, title = Tokenizer(config), self.preset
        elif self.partial_start:
            tokenizer = Tokenizer(config)
            missing = take_what_fits(tokenizer, start.state_dict())
            if len(missing) == len(tokenizer.state_dict()):
                raise ConfigError(f"start has no tensor that fits the preset {self.preset}, got {self.start}")
            title = f"{self.preset} from {self.start} but for {', '.join(missing) or 'nothing'}"
        else:
            try:
                tokenizer, title = (
                    Tokenizer.from_stored(config, start.state_dict(), str(self.start)),
                    f"from {self.start}",
                )
            except CheckpointError as e:
                raise ConfigError(f"start has no weights for this image_size and num_stages: {e}") from e
        if self.one_step.share == 1:  # no image ever meets the null context
            msdd_parts(tokenizer)[1].context_null.requires_grad_(False)
        return Components(tokenizer, recipe, title)
