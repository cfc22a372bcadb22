"""The stage-2 program: a trained tokenizer in, its one-step student out. ``msdd-fast distill`` is its command line."""

from __future__ import annotations

import copy
import dataclasses
import sys
from dataclasses import dataclass, field

import torch

from msdd_fast.diffusion.config import SamplingConfig
from msdd_fast.errors import ConfigError
from msdd_fast.tokenizer import Tokenizer
from msdd_fast.training.loop.distributed import agree, is_first, process_group, world_size
from msdd_fast.training.loop.trainer import AdamConfig, Critic, Trainer, provenance
from msdd_fast.training.losses.dino import SOURCE, load_dino, random_features
from msdd_fast.training.losses.discriminator import Discriminator
from msdd_fast.training.losses.perceptual import make_perceptual
from msdd_fast.training.recipes.stage2 import Stage2Config, Stage2Recipe
from msdd_fast.training.run import RunConfig, make_dataset, make_folder, make_validation, preview_images


@dataclass(frozen=True)
class DistillConfig(RunConfig):
    """Stage-2 training of a decoder with one step per scale (docs/spec.md#stage2-loss)."""

    teacher: str = "msdd-nano-teacher"
    """Trained tokenizer: a bundled name, a directory or a hub id. Its encoder stays as it is."""
    student: str | None = None
    """What the student starts from, if not from the teacher: the same encoder, any decoder."""
    discriminator: str | None = None
    """Backbone of the adversarial recipe: a file of DINO's ViT-S/16, the name of a timm model that is in the local
    Hugging Face cache, or "random" (untrained, for tests only)."""
    objective: Stage2Config = field(default_factory=Stage2Config)
    critic: AdamConfig = field(default_factory=lambda: AdamConfig(lr=5e-5))
    """Optimiser of the discriminator, with a schedule of its own."""


def train_stage2(config: DistillConfig) -> Tokenizer:
    """Train, and return the averaged student; it is also at ``out``/checkpoint, set to one step without guidance.

    Under torchrun, one of its processes. Raises ConfigError, CheckpointError or InputError, each before the first step.
    """
    with process_group(config.loop.device) as device:
        config = dataclasses.replace(config, loop=dataclasses.replace(config.loop, device=device))
        return make_trainer(config).run()


def make_trainer(config: DistillConfig) -> Trainer:
    """The trainer of ``config``, ready to run; raises every error of the configuration, once for all processes."""
    loop, objective = config.loop, config.objective
    adversarial = not objective.matches_teacher and objective.adversarial_weight > 0

    def networks() -> tuple[Tokenizer, Tokenizer, torch.nn.Module | None, Discriminator | None]:
        if adversarial and config.discriminator is None:
            raise ConfigError(f"recipe 'adversarial' needs discriminator, the file of its backbone, got none: {SOURCE}")
        teacher = Tokenizer.from_pretrained(config.teacher)
        if teacher.config.family != "msdd":
            raise ConfigError(f"teacher must be of the family msdd, got {config.teacher}")
        student = make_student(teacher, config.student)
        perceptual = discriminator = None
        if objective.perceptual_weight > 0:
            perceptual = make_perceptual(config.perceptual, config.vgg19, config.vgg16, config.lpips_heads)
            perceptual = perceptual.to(loop.device)
        if adversarial:
            assert config.discriminator is not None
            chosen = random_features() if config.discriminator == "random" else load_dino(config.discriminator)
            torch.manual_seed(loop.seed)
            discriminator = Discriminator(chosen.to(loop.device))
        return teacher, student, perceptual, discriminator

    teacher, student, perceptual, discriminator = agree(networks)
    size = teacher.config.image_size
    dataset = make_dataset(config, size)

    def recipe() -> Stage2Recipe:
        preview = preview_images(config.preview, dataset, size).to(loop.device)
        made = Stage2Recipe(objective, teacher.to(loop.device), perceptual, discriminator, preview)
        make_folder(config)
        return made

    made, validation = agree(lambda: (recipe(), make_validation(config, size)))
    critic = None if discriminator is None else Critic(discriminator, made.critic_loss, config.critic)
    if is_first():
        trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
        print(
            f"{objective.recipe}, teacher {config.teacher}: {trained / 1e6:.2f} M parameters, {size} px; "
            f"{len(dataset)} images; {world_size()} process{'es' if world_size() > 1 else ''}",
            file=sys.stderr,
            flush=True,
        )
    return Trainer(student, dataset, made, config.out, config.optim, loop, provenance(config), critic, validation)


def make_student(teacher: Tokenizer, path: str | None = None) -> Tokenizer:
    """The student: a copy of the teacher, or the tokenizer at ``path``; one step, no guidance, frozen encoder.

    Raises ConfigError if it does not decode the teacher's latent tokens in the teacher's stages.
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
    student.config = dataclasses.replace(student.config, sampling=SamplingConfig(steps=1, cfg_scale=1.0))
    student.requires_grad_(True)
    student.encoder.requires_grad_(False)
    return student
