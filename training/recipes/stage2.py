"""Stage 2: a student with one step per scale, distilled from the multi-step teacher (docs/spec.md#stage2-loss).

Two recipes, one objective:

* "adversarial" (the paper): the student decodes; its image is noised again to the start of a random stage, from where
  the teacher decodes; the student learns the teacher's states, the photograph's perceptual features, and to deceive
  a discriminator.
* "teacher-matching" (SSDD): the teacher decodes in several steps from the very noise that the student gets, and the
  student learns the result. No discriminator.

The encoder is frozen, so that latent tokens of teacher and student are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from msdd_fast.diffusion.checks import check_sampling
from msdd_fast.diffusion.noise import renoise_noise, start_noise
from msdd_fast.diffusion.schedule import NUM_TIMESTEPS, StageSchedule
from msdd_fast.errors import ConfigError
from msdd_fast.families.msdd.decoder import Decoder
from msdd_fast.io.images import grid_image
from msdd_fast.ops.renoise_upsample import renoise_upsample_with
from msdd_fast.sampling import velocity
from msdd_fast.tokenizer import Tokenizer
from msdd_fast.training.loop.draws import Draws, Purpose
from msdd_fast.training.losses.adversarial import AdversarialLoss, adaptive_weight, discriminator_loss, generator_loss
from msdd_fast.training.losses.augment import NUM_DRAWS
from msdd_fast.training.losses.discriminator import Discriminator
from msdd_fast.training.losses.perceptual import Perceptual
from msdd_fast.training.recipes.stage1 import image_pyramid


@dataclass(frozen=True)
class Stage2Config:
    """The stage-2 objective. Fields from ``restart`` on belong to the adversarial recipe."""

    recipe: Literal["adversarial", "teacher-matching"] = "adversarial"
    teacher_steps: int | None = None
    """The teacher's Euler steps per scale. Default: 1 (adversarial: the paper) or 7 (teacher-matching: SSDD)."""
    teacher_cfg_scale: float = 1.0
    student_cfg_scale: float = 1.0
    """Other than 1, the student is unrolled with guidance: two evaluations per scale in training."""
    context_dropout: float = 0.0
    """Probability that the student gets the null context (the authors' code: 0.1)."""
    reconstruction_weight: float = 1.0
    """Weight of the MSE to the teacher's state, summed over the stages; 0 = no teacher is run."""
    image_weight: float = 0.0
    """Weight of the MSE of the final image to the photograph."""
    perceptual_weight: float = 0.5
    """Weight of the perceptual distance of the final image."""
    perceptual_target: Literal["recipe", "image", "teacher"] = "recipe"
    """What it is measured against. "recipe": the photograph (adversarial) or the teacher's image (teacher-matching)."""
    perceptual_crop: int | None = None
    """Measure it on a random square crop of this many pixels, one place for the batch: it costs as much less."""
    restart: Literal["schedule", "authors"] = "schedule"
    """Where the teacher starts. "schedule": at the start level of a stage, blurred as the stage expects it, with the
    noise that the student's own path carries there. "authors": at level u in that stage's resolution, fresh noise."""
    adversarial_loss: AdversarialLoss = "hinge"
    adversarial_weight: float = 1.0
    adaptive: bool = True
    """Multiply the adversarial weight by the ratio of the gradients at the final layer."""
    distillation_weight: float = 2.5
    """Factor of all terms but the adversarial one (the authors' code)."""
    consistency_weight: float = 0.0
    """Weight of the discriminator's squared change under augmentation."""

    def __post_init__(self) -> None:
        check_sampling(self.steps, self.teacher_cfg_scale)
        check_sampling(1, self.student_cfg_scale)
        names = ("reconstruction", "image", "perceptual", "adversarial", "distillation", "consistency")
        for name in (f"{n}_weight" for n in names):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name} must be at least 0, got {getattr(self, name)}")
        if not 0 <= self.context_dropout < 1:
            raise ConfigError(f"context_dropout must be in [0, 1), got {self.context_dropout}")
        if self.perceptual_crop is not None and self.perceptual_crop < 1:
            raise ConfigError(f"perceptual_crop must be at least 1, got {self.perceptual_crop}")
        if self.perceptual_target == "teacher" and self.perceptual_weight > 0 and not self.matches_teacher:
            raise ConfigError("perceptual_target 'teacher' needs recipe 'teacher-matching', got 'adversarial'")
        if self.perceives_teacher and self.reconstruction_weight == 0:
            raise ConfigError("perceptual_target 'teacher' needs reconstruction_weight > 0, got 0: no teacher is run")
        if self.reconstruction_weight == self.image_weight == self.perceptual_weight == 0:
            raise ConfigError("one of reconstruction_weight, image_weight and perceptual_weight must be above 0")

    @property
    def matches_teacher(self) -> bool:
        return self.recipe == "teacher-matching"

    @property
    def steps(self) -> int:
        """Steps per scale of the teacher."""
        return (7 if self.matches_teacher else 1) if self.teacher_steps is None else self.teacher_steps

    @property
    def perceives_teacher(self) -> bool:
        """Whether the perceptual distance is measured against the teacher's image."""
        target = self.perceptual_target
        return self.perceptual_weight > 0 and (target == "teacher" or (target == "recipe" and self.matches_teacher))


def draw_noise(schedule: StageSchedule, image_size: int, seeds: Tensor) -> list[Tensor]:
    """The noise of a decode with ``seeds`` (B,), as ``sampling.sample`` takes it: one (B, 3, H_s, H_s) per stage."""
    sizes = [image_size >> s for s in reversed(range(len(schedule)))]
    rho = schedule.config.block_correlation
    renoising = [renoise_noise(seeds, (3, r, r), s, rho) for s, r in enumerate(sizes) if s]
    return [start_noise(seeds, (3, sizes[0], sizes[0])), *renoising]


def unroll(
    decoder: Decoder,
    x: Tensor,
    z: Tensor,
    schedule: StageSchedule,
    noise: Sequence[Tensor],
    start: int = 0,
    steps: int = 1,
    cfg_scale: float = 1.0,
) -> list[Tensor]:
    """States at the end of the stages ``start``, ..., from ``x``, the state at the beginning of ``start``.

    The sampler (docs/spec.md#sampler) in plain autograd; ``noise[s]`` is what beta multiplies before stage s > start.
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


def path_noise(schedule: StageSchedule, noise: Sequence[Tensor], stage: int) -> Tensor:
    """The noise that a decode with ``noise`` carries at the start of ``stage``: (B, 3, H_s, H_s).

    The state there is (1 - start_t) * image + start_t * this. Upsampled and renoised with the rest
    (docs/spec.md#renoise); for the block correlation -1/3 it is white with unit variance.
    """
    n = noise[0]
    for before, here in zip(schedule.stages[:stage], schedule.stages[1 : stage + 1], strict=True):
        up = F.interpolate(n, scale_factor=2.0, mode="nearest")
        n = (here.alpha * before.end_t * up + here.beta * noise[here.index]) / here.start_t
    return n


def _crop(x: Tensor, y: Tensor, size: int | None, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The same random square of both; all of them if they are no larger."""
    height, width = x.shape[-2:]
    if size is None or size >= min(height, width):
        return x, y
    draw = torch.rand(2, generator=generator).tolist()
    top, left = int(draw[0] * (height - size + 1)), int(draw[1] * (width - size + 1))
    window = (..., slice(top, top + size), slice(left, left + size))
    return x[window], y[window]


def stage_of(schedule: StageSchedule, u: float) -> int:
    """The stage whose timesteps hold 1000 u: the i with T_max[i] >= 1000 u > T_max[i + 1]."""
    above = [s.index for s in schedule.stages if s.timestep_max >= NUM_TIMESTEPS * u]
    return above[-1]


def teacher_states(
    teacher: Tokenizer,
    image: Tensor,
    z: Tensor,
    noise: Sequence[Tensor],
    config: Stage2Config,
    draws: Draws,
) -> tuple[int, float, list[Tensor]]:
    """First stage of the teacher, its u (docs/spec.md#stage2-loss), and the teacher's states from there on.

    ``image`` (B, 3, R, R) is the student's, ``noise`` what the student decoded with.
    """
    schedule, size = teacher.schedule, image.shape[-1]
    if config.matches_teacher:
        start, u, x = 0, 1.0, noise[0]
    else:
        u = float(torch.rand((), generator=draws.shared(Purpose.RESTART_LEVEL)))
        start = stage_of(schedule, u)
        pyramid = image_pyramid(image, len(schedule))
        if config.restart == "authors":
            noise = draw_noise(schedule, size, draws.seeds(Purpose.RESTART_NOISE).to(image.device))
            fine = pyramid[start + 1]
            x = (1 - u) * fine + u * start_noise(draws.seeds(Purpose.RESTART_START).to(image.device), fine.shape[1:])
        else:
            level = schedule[start].start_t
            blurred = F.interpolate(pyramid[start], scale_factor=2.0, mode="nearest")
            x = (1 - level) * blurred + level * path_noise(schedule, noise, start)
    return start, u, unroll(teacher.decoder, x, z, schedule, noise, start, config.steps, config.teacher_cfg_scale)


class Stage2Recipe:
    """Stage 2 as a ``trainer.Recipe``; its ``critic_loss`` is that of the discriminator.

    Args:
        config: the objective.
        teacher: a trained tokenizer; frozen here, in eval mode, on the device of training.
        perceptual: needed when perceptual_weight > 0.
        discriminator: needed by the adversarial recipe with adversarial_weight > 0.
        preview: images (B, 3, R, R) for the sample pictures: original, teacher, student.

    Raises ConfigError where one of them is missing.
    """

    def __init__(
        self,
        config: Stage2Config,
        teacher: Tokenizer,
        perceptual: Perceptual | None = None,
        discriminator: Discriminator | None = None,
        preview: Tensor | None = None,
    ) -> None:
        if config.perceptual_weight > 0 and perceptual is None:
            raise ConfigError("perceptual_weight > 0 needs a perceptual distance; give its weights file")
        if not config.matches_teacher and config.adversarial_weight > 0 and discriminator is None:
            raise ConfigError("recipe 'adversarial' needs a discriminator; give the file of its backbone")
        self.config, self.perceptual, self.preview = config, perceptual, preview
        self.teacher = teacher.eval().requires_grad_(False)
        adversarial = not config.matches_teacher and config.adversarial_weight > 0
        self.discriminator = discriminator if adversarial else None
        self._pairs: list[tuple[Draws, Tensor, Tensor]] = []
        self._teacher_preview: Tensor | None = None

    def loss(self, tokenizer: Tokenizer, images: Tensor, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of the student on images (B, 3, R, R) in [-1, 1], and detached figures."""
        config, schedule, device = self.config, tokenizer.schedule, images.device
        with torch.no_grad():
            z = tokenizer.encoder(images)
        noise = draw_noise(schedule, images.shape[-1], draws.seeds(Purpose.NOISE).to(device))
        null = (draws.uniform(Purpose.NULL_CONTEXT)[0] < config.context_dropout).to(device)
        context = torch.where(null[:, None, None], tokenizer.decoder.context_null.to(z.dtype), z)
        states = unroll(tokenizer.decoder, noise[0], context, schedule, noise, cfg_scale=config.student_cfg_scale)
        fake, figures = states[-1], {}
        total = plain = fake.new_zeros(())
        target = images
        if config.reconstruction_weight > 0:
            with torch.no_grad():
                start, u, targets = teacher_states(self.teacher, fake.detach(), z, noise, config, draws)
            term = torch.stack([F.mse_loss(a, b) for a, b in zip(states[start:], targets, strict=True)]).sum()
            figures["reconstruction"] = term.detach()
            plain = plain + config.reconstruction_weight * term
            # The authors' c = 1 / (1 + u): the later the teacher starts, the more its states say.
            total = total + config.reconstruction_weight * term / (1 if config.matches_teacher else 1 + u)
            if config.perceives_teacher:
                target = targets[-1]
        rest = fake.new_zeros(())
        if config.image_weight > 0:
            term = F.mse_loss(fake, images.float())
            figures["image_mse"] = term.detach()
            rest = rest + config.image_weight * term
        if config.perceptual_weight > 0:
            assert self.perceptual is not None
            place = draws.shared(Purpose.PERCEPTUAL_CROP)
            term = self.perceptual(*_crop(fake, target, config.perceptual_crop, place)).mean()
            figures[self.perceptual.name] = term.detach()
            rest = rest + config.perceptual_weight * term
        plain, total = plain + rest, total + rest
        if self.discriminator is None:
            return total if config.matches_teacher else config.distillation_weight * total, figures
        with self.discriminator.frozen():
            logits = self.discriminator(fake, draws.shared(Purpose.GENERATOR_CROP))
            term = generator_loss(logits, config.adversarial_loss)
        weight = fake.new_tensor(config.adversarial_weight)
        if config.adaptive:
            weight = weight * adaptive_weight(plain, term, tokenizer.decoder.final_layer.linear.weight)
        figures[f"{self.discriminator.name}/generator"] = term.detach()
        figures[f"{self.discriminator.name}/weight"] = weight
        self._pairs = [p for p in self._pairs if p[0].step == draws.step]
        self._pairs.append((draws, images.float(), fake.detach()))
        return config.distillation_weight * total + weight * term, figures

    def critic_loss(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of the discriminator on the photographs and the student's images of the last step, all together."""
        assert self.discriminator is not None and self._pairs
        draws = Draws(self._pairs[0][0].seed, self._pairs[0][0].step, torch.cat([d.samples for d, *_ in self._pairs]))
        real, fake = (torch.cat([pair[i] for pair in self._pairs]) for i in (1, 2))
        self._pairs.clear()
        name, config, crops = self.discriminator.name, self.config, draws.shared(Purpose.CRITIC_CROP)
        on_real, on_fake = self.discriminator(real, crops), self.discriminator(fake, crops)
        loss = discriminator_loss(on_real, on_fake, config.adversarial_loss)
        figures = {
            f"{name}/discriminator": loss.detach(),
            f"{name}/real": on_real.detach().mean(),
            f"{name}/fake": on_fake.detach().mean(),
        }
        if config.consistency_weight > 0:
            change = torch.zeros_like(loss)
            for x, logits, purpose in (
                (real, on_real, Purpose.AUGMENT_REAL),
                (fake, on_fake, Purpose.AUGMENT_FAKE),
            ):
                uniform = draws.uniform(purpose, NUM_DRAWS)
                change = change + self.discriminator.change_under_augmentation(x, logits, uniform, crops)
            figures[f"{name}/consistency"] = change.detach()
            loss = loss + config.consistency_weight * change
        return loss, figures

    @torch.no_grad()
    def picture(self, tokenizer: Tokenizer) -> Image.Image | None:
        """Original, teacher and student of the preview images, one row each."""
        if self.preview is None:
            return None
        z = tokenizer.encode(self.preview)
        if self._teacher_preview is None:
            self._teacher_preview = self.teacher.decode(
                z, steps=self.config.steps, cfg_scale=self.config.teacher_cfg_scale
            )
        student = tokenizer.decode(z, steps=1, cfg_scale=self.config.student_cfg_scale)
        rows = [list(row) for row in zip(self.preview, self._teacher_preview, student, strict=True)]
        return grid_image(rows, self.preview.shape[-1])
