"""MSDD, stage 2: a student with one step per scale, distilled from its teacher (docs/spec.md#stage2-loss).

Two recipes, one objective:

* "adversarial" (the paper): the student decodes. Its image is noised again to the start of a random stage, from which
  the teacher decodes. The student learns the teacher's states, the perceptual features of the real image, and to fool a
  discriminator.
* "teacher-matching" (as SSDD): the teacher decodes in several steps from the student's own noise, and the student
  learns the result. No discriminator.

The encoder is frozen, so that teacher and student have the same latent tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from msdd_fast.diffusion.checks import check_sampling
from msdd_fast.diffusion.config import SamplingConfig
from msdd_fast.diffusion.noise import start_noise
from msdd_fast.errors import ConfigError
from msdd_fast.metrics.vgg19 import Vgg19Distance
from msdd_fast.sampling import VelocityModel
from msdd_fast.tokenizer import Tokenizer
from msdd_fast.training.config import Components, RunConfig, replace_config
from msdd_fast.training.loop.config import AdamConfig
from msdd_fast.training.loop.draws import Draws, Purpose
from msdd_fast.training.loop.numbers import Range, check_numbers
from msdd_fast.training.loop.objective import Critic, Loss
from msdd_fast.training.losses.adversarial import AdversarialLoss, adaptive_weight, discriminator_loss, generator_loss
from msdd_fast.training.losses.augment import NUM_DRAWS
from msdd_fast.training.losses.crop import random_crop
from msdd_fast.training.losses.dino import SOURCE, PatchFeatures, load_dino, random_features
from msdd_fast.training.losses.discriminator import Discriminator
from msdd_fast.training.losses.perceptual import Perceptual, require_perceptual
from msdd_fast.training.losses.vgg_features import VggFeatures
from msdd_fast.training.preview import TeacherColumns
from msdd_fast.training.recipes.msdd_unroll import draw_noise, image_pyramid, msdd_parts, path_noise, stage_of, unroll


@dataclass(frozen=True)
class Stage2Config:
    """The stage-2 objective. The fields from ``restart`` on apply to the adversarial recipe only."""

    recipe: Literal["adversarial", "teacher-matching"] = "adversarial"
    teacher_steps: int | None = None
    """The teacher's Euler steps per scale. Default: 1 (adversarial: the paper) or 7 (teacher-matching: SSDD)."""
    teacher_cfg_scale: float = 1.0
    student_cfg_scale: float = 1.0
    """If not 1, the student is unrolled with guidance: two evaluations per scale."""
    context_dropout: float = 0.0
    """Probability of the null context for the student (the authors' code: 0.1)."""
    reconstruction_weight: float = 1.0
    """Weight of the MSE to the teacher's states, summed over the stages; 0: the teacher does not run."""
    image_weight: float = 0.0
    """Weight of the MSE between the final image and the real one."""
    perceptual_weight: float = 0.5
    """Weight of the perceptual distance of the final image."""
    perceptual_target: Literal["recipe", "image", "teacher"] = "recipe"
    """Its target. "recipe": the real image (adversarial) or the teacher's image (teacher-matching)."""
    perceptual_crop: int | None = None
    """Measure it on a random square crop of this many pixels, at one place for the whole batch, to save time."""
    restart: Literal["schedule", "authors"] = "schedule"
    """Where the teacher starts. "schedule": at the start level of a stage, with the blur that the stage expects and the
    noise of the student's own path. "authors": at level u in that stage's resolution, with fresh noise."""
    adversarial_loss: AdversarialLoss = "hinge"
    adversarial_weight: float = 1.0
    adaptive: bool = True
    """Multiply the adversarial weight by the ratio of the gradients at the final layer."""
    distillation_weight: float = 2.5
    """Factor of all terms except the adversarial one (the authors' code)."""
    consistency_weight: float = 0.0
    """Weight of the discriminator's consistency regularisation under augmentation."""

    def __post_init__(self) -> None:
        check_sampling(self.steps, self.teacher_cfg_scale)
        check_sampling(1, self.student_cfg_scale)
        names = ("reconstruction", "image", "perceptual", "adversarial", "distillation", "consistency")
        check_numbers(
            self,
            **{f"{name}_weight": Range(0) for name in names},
            context_dropout=Range(0, 1, open_high=True),
            perceptual_crop=Range(1, 2**20),
            teacher_steps=Range(1, 1000),
        )
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
    def is_adversarial(self) -> bool:
        """Whether there is a discriminator."""
        return not self.matches_teacher and self.adversarial_weight > 0

    @property
    def steps(self) -> int:
        """Steps per scale of the teacher."""
        return (7 if self.matches_teacher else 1) if self.teacher_steps is None else self.teacher_steps

    @property
    def perceives_teacher(self) -> bool:
        """Whether the target of the perceptual distance is the teacher's image."""
        target = self.perceptual_target
        return self.perceptual_weight > 0 and (target == "teacher" or (target == "recipe" and self.matches_teacher))


def teacher_states(
    teacher: Tokenizer,
    image: Tensor,
    z: Tensor,
    noise: Sequence[Tensor],
    config: Stage2Config,
    draws: Draws,
) -> tuple[int, float, list[Tensor]]:
    """Where the teacher takes over: (its first stage, u (docs/spec.md#stage2-loss), its states from there on).

    Args:
        teacher: frozen.
        image: the student's, (B, 3, R, R).
        z: latent tokens.
        noise: of the student's decode, a tensor per stage.
        config, draws: as of the recipe.
    """
    schedule, size = teacher.schedule, image.shape[-1]
    decoder = cast(VelocityModel, teacher.decoder)
    if config.matches_teacher:
        start, u, x = 0, 1.0, noise[0]
    else:
        u = float(torch.rand((), generator=draws.shared(Purpose.RESTART_LEVEL)))
        start = stage_of(schedule, u)
        pyramid = image_pyramid(image, len(schedule))
        if config.restart == "authors":
            noise = draw_noise(schedule, size, draws.seeds(Purpose.RESTART_NOISE).to(image.device))
            fine = pyramid[start + 1]
            fresh = start_noise(draws.seeds(Purpose.RESTART_START).to(image.device), (3, *fine.shape[2:]))
            x = (1 - u) * fine + u * fresh
        else:
            level = schedule[start].start_t
            blurred = F.interpolate(pyramid[start], scale_factor=2.0, mode="nearest")
            x = (1 - level) * blurred + level * path_noise(schedule, noise, start)
    return start, u, unroll(decoder, x, z, schedule, noise, start, config.steps, config.teacher_cfg_scale)


class Judged(NamedTuple):
    """What the discriminator learns from: a micro-batch of real images and the student's, (B, 3, R, R)."""

    draws: Draws
    real: Tensor
    fake: Tensor


class Stage2Recipe:
    """Stage 2 as a ``loop.objective.Recipe``; ``critic_loss`` is the loss of the discriminator.

    Args:
        config: the objective.
        teacher: a trained tokenizer on the device of training; put into eval mode and frozen.
        perceptual: needed when perceptual_weight > 0.
        discriminator: needed when the recipe is adversarial.

    Raises ConfigError if one of them is missing.
    """

    def __init__(
        self,
        config: Stage2Config,
        teacher: Tokenizer,
        perceptual: Perceptual | None = None,
        discriminator: Discriminator | None = None,
    ) -> None:
        require_perceptual(config.perceptual_weight, perceptual)
        if config.is_adversarial and discriminator is None:
            raise ConfigError("recipe 'adversarial' needs a discriminator; give the file of its backbone")
        self.config, self.perceptual = config, perceptual
        self.teacher = teacher.eval().requires_grad_(False)
        self.discriminator = discriminator if config.is_adversarial else None
        self._columns = TeacherColumns(teacher, config.steps, config.teacher_cfg_scale, config.student_cfg_scale)

    def loss(self, tokenizer: Tokenizer, images: Tensor, draws: Draws) -> Loss:
        """Loss of the student."""
        config, schedule, device = self.config, tokenizer.schedule, images.device
        encoder, decoder = msdd_parts(tokenizer)
        with torch.no_grad():
            z = encoder(images)
        noise = draw_noise(schedule, images.shape[-1], draws.seeds(Purpose.NOISE).to(device))
        null = (draws.uniform(Purpose.NULL_CONTEXT)[0] < config.context_dropout).to(device)
        context = torch.where(null[:, None, None], decoder.context_null.to(z.dtype), z)
        states = unroll(decoder, noise[0], context, schedule, noise, cfg_scale=config.student_cfg_scale)
        fake, metrics = states[-1], {}
        total = plain = fake.new_zeros(())
        target = images
        if config.reconstruction_weight > 0:
            with torch.no_grad():
                start, u, targets = teacher_states(self.teacher, fake.detach(), z, noise, config, draws)
            term = torch.stack([F.mse_loss(a, b) for a, b in zip(states[start:], targets, strict=True)]).sum()
            metrics["reconstruction"] = term.detach()
            plain = plain + config.reconstruction_weight * term
            # The authors' c = 1 / (1 + u): the later the teacher starts, the more its states are worth.
            total = total + config.reconstruction_weight * term / (1 if config.matches_teacher else 1 + u)
            if config.perceives_teacher:
                target = targets[-1]
        rest = fake.new_zeros(())
        if config.image_weight > 0:
            term = F.mse_loss(fake, images.float())
            metrics["image_mse"] = term.detach()
            rest = rest + config.image_weight * term
        if config.perceptual_weight > 0:
            assert self.perceptual is not None
            place = draws.shared(Purpose.PERCEPTUAL_CROP)
            term = self.perceptual(*random_crop(fake, target, config.perceptual_crop, place)).mean()
            metrics[self.perceptual.name] = term.detach()
            rest = rest + config.perceptual_weight * term
        plain, total = plain + rest, total + rest
        if self.discriminator is None:
            return Loss(total if config.matches_teacher else config.distillation_weight * total, metrics)
        with self.discriminator.frozen():
            logits = self.discriminator(fake, draws.shared(Purpose.GENERATOR_CROP))
            term = generator_loss(logits, config.adversarial_loss)
        weight = fake.new_tensor(config.adversarial_weight)
        if config.adaptive:
            weight = weight * adaptive_weight(plain, term, decoder.final_layer.linear.weight)
        metrics[f"{self.discriminator.name}/generator"] = term.detach()
        metrics[f"{self.discriminator.name}/weight"] = weight
        judged = Judged(draws, images.float(), fake.detach())
        return Loss(config.distillation_weight * total + weight * term, metrics, judged)

    def critic_loss(self, judged: Sequence[Judged]) -> Loss:
        """Loss of the discriminator on all micro-batches of a step together."""
        assert self.discriminator is not None
        first = judged[0].draws
        draws = Draws(first.seed, first.step, torch.cat([j.draws.samples for j in judged]))
        real, fake = torch.cat([j.real for j in judged]), torch.cat([j.fake for j in judged])
        name, config, crops = self.discriminator.name, self.config, draws.shared(Purpose.CRITIC_CROP)
        on_real, on_fake = self.discriminator(real, crops), self.discriminator(fake, crops)
        loss = discriminator_loss(on_real, on_fake, config.adversarial_loss)
        metrics = {
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
            metrics[f"{name}/consistency"] = change.detach()
            loss = loss + config.consistency_weight * change
        return Loss(loss, metrics)

    def preview(self, tokenizer: Tokenizer, images: Tensor) -> list[Tensor]:
        """Teacher and student."""
        return self._columns(tokenizer, images)


@dataclass(frozen=True)
class MSDDDistillConfig(RunConfig):
    """Distillation of an MSDD tokenizer's decoder into one step per scale (docs/spec.md#stage2-loss)."""

    teacher: str = "msdd-nano"
    """Trained tokenizer: a bundled name, a directory or a hub id. The student keeps its encoder."""
    student: str | None = None
    """Checkpoint that the student starts from, if not the teacher: the same encoder, any decoder."""
    discriminator: str | None = None
    """Backbone of the adversarial recipe's discriminator: a file of DINO's ViT-S/16, the name of a timm model in the
    local Hugging Face cache, "vgg19" (the file ``vgg19``), or "random" (untrained, for tests only)."""
    objective: Stage2Config = field(default_factory=Stage2Config)
    critic: AdamConfig = field(default_factory=lambda: AdamConfig(lr=5e-5))
    """Optimiser of the discriminator, with its own schedule."""

    def build(self) -> Components:
        objective, device = self.objective, self.loop.device
        if objective.is_adversarial and self.discriminator is None:
            raise ConfigError(
                f"recipe 'adversarial' needs discriminator, the file of its backbone or 'vgg19', got none: {SOURCE}"
            )
        teacher = Tokenizer.from_pretrained(self.teacher)
        if teacher.config.family != "msdd":
            raise ConfigError(f"teacher must be of the family msdd, got {self.teacher}")
        student = make_student(teacher, self.student)
        perceptual = self.perceptual_distance(objective.perceptual_weight)
        discriminator = self._discriminator() if objective.is_adversarial else None
        recipe = Stage2Recipe(objective, teacher.to(device), perceptual, discriminator)
        critic = None if discriminator is None else Critic(discriminator, recipe.critic_loss, self.critic)
        return Components(student, recipe, f"{objective.recipe}, teacher {self.teacher}", critic)

    def _discriminator(self) -> Discriminator:
        assert self.discriminator is not None
        if self.discriminator == "vgg19":
            if self.vgg19 is None:
                raise ConfigError(f"discriminator 'vgg19' needs the file vgg19, got none: {Vgg19Distance.SOURCE}")
            features: PatchFeatures | VggFeatures = VggFeatures(self.vgg19)
        elif self.discriminator == "random":
            features = random_features()
        else:
            features = load_dino(self.discriminator)
        torch.manual_seed(self.loop.seed)
        return Discriminator(features.to(self.loop.device))


def make_student(teacher: Tokenizer, path: str | None = None) -> Tokenizer:
    """A copy of the teacher, or the tokenizer at ``path``, set to one step without guidance, with a frozen encoder.

    Raises ConfigError if it does not have the teacher's latent tokens and stages.
    """
    student = copy.deepcopy(teacher) if path is None else Tokenizer.from_pretrained(path)
    for name in ("image_size", "num_latent_tokens", "latent_dim", "schedule", "encoder"):
        mine, theirs = getattr(student.config, name), getattr(teacher.config, name)
        if mine != theirs:
            raise ConfigError(f"student must have the teacher's {name}, {theirs}, got {mine}")
    weights = teacher.encoder.state_dict()
    for name, tensor in student.encoder.state_dict().items():
        if not torch.equal(tensor, weights[name]):
            raise ConfigError(f"student must have the teacher's encoder, got other weights in encoder.{name}")
    replace_config(student, sampling=SamplingConfig(steps=1, cfg_scale=1.0))
    student.requires_grad_(True)
    student.encoder.requires_grad_(False)
    return student
