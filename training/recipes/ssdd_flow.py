"""SSDD: flow matching of decoder and, unless it is frozen, encoder (docs/spec.md#ssdd-training)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from msdd_fast.errors import ConfigError
from msdd_fast.families import get_preset
from msdd_fast.families.ssdd.config import SSDDConfig
from msdd_fast.tokenizer import Tokenizer
from msdd_fast.training.config import Components, replace_config
from msdd_fast.training.loop.draws import Draws, Purpose
from msdd_fast.training.loop.objective import Loss
from msdd_fast.training.preview import stage_columns
from msdd_fast.training.recipes.ssdd_objective import (
    SSDDObjective,
    SSDDRunConfig,
    Terms,
    draw_noise,
    load_tokenizer,
    ssdd_parts,
)


class SSDDRecipe(Terms):
    """Learns v at random t, with latents sampled from the encoder's posterior. Arguments as of ``Terms``."""

    def loss(self, tokenizer: Tokenizer, images: Tensor, draws: Draws) -> Loss:
        config, images = self.config, images.float()
        encoder, decoder = ssdd_parts(tokenizer)
        with torch.set_grad_enabled(config.train_encoder and torch.is_grad_enabled()):
            posterior = encoder.posterior(images)
            z = posterior.sample(draw_noise(posterior.mean, draws, Purpose.LATENT_NOISE))
        noise = draw_noise(images, draws, Purpose.NOISE)
        t = draws.normal(Purpose.TIME).sigmoid().to(images.device)
        tt = t[:, None, None, None]
        x_t = (1 - tt) * images + tt * noise
        v, tokens = self.velocity(decoder, x_t, t, z)
        mse = F.mse_loss(v, noise - images)
        more, metrics, aligned = self.more_terms(x_t - tt * v, images, tokens, images)
        metrics["mse"] = mse.detach()
        total = mse + more
        if config.train_encoder and config.kl_weight > 0:
            kl = posterior.kl().mean()
            metrics["kl"] = kl.detach()
            total = total + config.kl_weight * kl
        return Loss(total, metrics, aligned)

    def preview(self, tokenizer: Tokenizer, images: Tensor) -> list[Tensor]:
        """The reconstruction."""
        return stage_columns(tokenizer, images)


def trainable(tokenizer: Tokenizer, objective: SSDDObjective) -> Tokenizer:
    """``tokenizer`` with gradients for everything that ``SSDDRecipe`` trains."""
    tokenizer.requires_grad_(True)
    tokenizer.encoder.requires_grad_(objective.train_encoder)
    return tokenizer


@dataclass(frozen=True)
class SSDDTrainConfig(SSDDRunConfig):
    """Flow matching of an SSDD tokenizer (docs/spec.md#ssdd-training)."""

    preset: str = "ssdd-s-f8c4"
    """Model: a preset name."""
    start: str | None = None
    """Checkpoint to start from, instead of the preset with random weights."""
    image_size: int | None = None
    """Side of the square crops to train on, if not the model's."""

    def build(self) -> Components:
        torch.manual_seed(self.loop.seed)
        tokenizer = load_tokenizer(self.start, "start") if self.start is not None else self._random_weights()
        if self.image_size is not None:
            replace_config(tokenizer, image_size=self.image_size)
        recipe = SSDDRecipe(self.objective, self.perceptual_distance(self.objective.perceptual_weight))
        return Components(trainable(tokenizer, self.objective), recipe, "flow matching")

    def _random_weights(self) -> Tokenizer:
        preset = get_preset(self.preset)
        if not isinstance(preset, SSDDConfig):
            raise ConfigError(f"preset must be of the family ssdd, got {self.preset}")
        return Tokenizer(preset)
