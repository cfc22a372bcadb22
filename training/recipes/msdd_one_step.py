"""MSDD's decode in one step per scale as an objective of stage 1, with gradients into the encoder
(docs/spec.md#one-step-loss)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from msdd_fast.diffusion.schedule import StageSchedule
from msdd_fast.errors import ConfigError
from msdd_fast.families.msdd.decoder import Decoder
from msdd_fast.training.loop.draws import Draws, Purpose
from msdd_fast.training.loop.numbers import Range, check_numbers
from msdd_fast.training.loop.objective import Loss
from msdd_fast.training.losses.crop import random_crop
from msdd_fast.training.recipes.msdd_unroll import draw_noise, image_pyramid, path_noise, unroll


@dataclass(frozen=True)
class OneStepConfig:
    """The images of a batch that are decoded in one step per scale, in place of flow matching."""

    share: float = 0.0
    """Share of the images; 0: flow matching alone (the paper), 1: none."""
    image_loss: Literal["l2", "l1"] = "l2"
    """Mean square or mean absolute difference."""
    coarse_weight: float = 0.05
    """Weight of the same loss of the images in the states at the end of the coarser scales, a mean over them."""
    perceptual_weight: float = 0.0
    """Weight of the perceptual distance of the image."""
    perceptual_crop: int | None = None
    """Measure it on a random square crop of this many pixels, at one place for the whole batch, to save time."""

    def __post_init__(self) -> None:
        check_numbers(
            self,
            share=Range(0, 1),
            coarse_weight=Range(0),
            perceptual_weight=Range(0),
            perceptual_crop=Range(1, 2**20),
        )
        if self.image_loss not in ("l2", "l1"):
            raise ConfigError(f"image_loss must be 'l2' or 'l1', got {self.image_loss!r}")

    def metrics(self, num_stages: int) -> list[str]:
        """Names of the terms of the loss."""
        coarse = [f"coarse_{self.image_loss}"] if num_stages > 1 and self.coarse_weight > 0 else []
        return [f"image_{self.image_loss}", *coarse, *(["perceptual"] if self.perceptual_weight > 0 else [])]

    def chosen(self, samples: Tensor) -> Tensor:
        """bool (B,): which of the global sample indices are decoded. Evenly spread, so that work is."""
        return ((samples + 1) * self.share).floor() > (samples * self.share).floor()


def one_step_loss(
    decoder: Decoder,
    schedule: StageSchedule,
    images: Tensor,
    z: Tensor,
    config: OneStepConfig,
    draws: Draws,
    perceptual: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Loss:
    """Loss of images (B, 3, R, R) in [-1, 1] and their latent tokens, a mean over the images.

    A decode is unrolled over all scales. The state at the end of each, without the noise that the schedule wants in it,
    learns the photograph, shrunk. The metrics are vectors of the images' values.
    """
    images = images.float()
    noise = draw_noise(schedule, images.shape[-1], draws.seeds(Purpose.NOISE).to(images.device))
    states = unroll(decoder, noise[0], z, schedule, noise)
    pyramid = image_pyramid(images, len(schedule))
    distance = F.mse_loss if config.image_loss == "l2" else F.l1_loss
    terms = []  # of every scale, (B,)
    for stage, state, image in zip(schedule.stages, states, pyramid[1:], strict=True):
        clean = (state.float() - stage.end_t * path_noise(schedule, noise, stage.index)) / (1 - stage.end_t)
        terms.append(distance(clean, image, reduction="none").mean(dim=(1, 2, 3)))
    found, weights = [terms[-1]], [1.0]
    if len(terms) > 1 and config.coarse_weight > 0:
        found.append(torch.stack(terms[:-1]).mean(dim=0))
        weights.append(config.coarse_weight)
    if perceptual is not None and config.perceptual_weight > 0:
        place = draws.shared(Purpose.PERCEPTUAL_CROP)
        found.append(perceptual(*random_crop(states[-1], images, config.perceptual_crop, place)))
        weights.append(config.perceptual_weight)
    total = torch.stack([w * term.mean() for w, term in zip(weights, found, strict=True)]).sum()
    names = config.metrics(len(schedule))
    return Loss(total, {name: term.detach() for name, term in zip(names, found, strict=True)})
