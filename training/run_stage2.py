"""The stage-2 program: a trained tokenizer in, its one-step student out. ``msdd-fast distill`` is its command line."""

from __future__ import annotations

import copy
import dataclasses
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch

from msdd_fast.config import SamplingConfig
from msdd_fast.errors import ConfigError, InputError
from msdd_fast.models.tokenizer import Tokenizer
from msdd_fast.training.data import ImageDataset, find_images
from msdd_fast.training.dino import SOURCE, load_dino, random_features
from msdd_fast.training.discriminator import Discriminator
from msdd_fast.training.perceptual import PerceptualName, make_perceptual
from msdd_fast.training.run_stage1 import preview_images
from msdd_fast.training.stage2 import Stage2Config, Stage2Recipe
from msdd_fast.training.trainer import AdamConfig, Critic, LoopConfig, OptimConfig, Trainer, provenance


@dataclass(frozen=True)
class DistillConfig:
    """Stage-2 training of a decoder with one step per scale (SPEC A6)."""

    data: tuple[str, ...]
    """Image folders and .tar shards."""
    out: str
    """Folder of the run; an interrupted run in it is continued."""
    teacher: str = "msdd-nano-teacher"
    """Trained tokenizer: a bundled name, a directory or a hub id. Its encoder stays as it is."""
    student: str | None = None
    """What the student starts from, if not from the teacher: the same encoder, any decoder."""
    min_crop: float = 0.8
    """Random square crops take this much to all of the shorter side."""
    flip: bool = True
    preview: str | None = None
    """Folder or picture for the sample grids (default: the first training images)."""
    perceptual: PerceptualName = "vgg19"
    """Network of the perceptual loss. "random" is untrained, for tests only."""
    vgg19: str | None = None
    """vgg_normalised_conv3_1.pth, for perceptual "vgg19"."""
    vgg16: str | None = None
    """torchvision's vgg16-397923af.pth, for perceptual "lpips-vgg"."""
    lpips_heads: str | None = None
    """LPIPS v0.1's vgg.pth, for perceptual "lpips-vgg"."""
    discriminator: str | None = None
    """Backbone of the adversarial recipe: a file of DINO's ViT-S/16, the name of a timm model that is in the local
    Hugging Face cache, or "random" (untrained, for tests only)."""
    objective: Stage2Config = field(default_factory=Stage2Config)
    optim: OptimConfig = field(default_factory=OptimConfig)
    critic: AdamConfig = field(default_factory=lambda: AdamConfig(lr=5e-5))
    """Optimiser of the discriminator, with a schedule of its own."""
    loop: LoopConfig = field(default_factory=LoopConfig)


def train_stage2(config: DistillConfig) -> Tokenizer:
    """Train, and return the averaged student; it is also at ``out``/checkpoint, set to one step without guidance.

    Raises ConfigError, CheckpointError or InputError, each before the first step.
    """
    loop, objective = config.loop, config.objective
    adversarial = not objective.matches_teacher and objective.adversarial_weight > 0
    if adversarial and config.discriminator is None:
        raise ConfigError(f"recipe 'adversarial' needs discriminator, the file of its backbone, got none: {SOURCE}")
    teacher = Tokenizer.from_pretrained(config.teacher)
    student = make_student(teacher, config.student)
    perceptual = None
    if objective.perceptual_weight > 0:
        perceptual = make_perceptual(config.perceptual, config.vgg19, config.vgg16, config.lpips_heads).to(loop.device)
    discriminator = None
    if adversarial:
        assert config.discriminator is not None
        chosen = random_features() if config.discriminator == "random" else load_dino(config.discriminator)
        torch.manual_seed(loop.seed)
        discriminator = Discriminator(chosen.to(loop.device))
    size = teacher.config.image_size
    dataset = ImageDataset(find_images(config.data), size, loop.seed, config.min_crop, config.flip)
    preview = preview_images(config.preview, dataset, size).to(loop.device)
    recipe = Stage2Recipe(objective, teacher.to(loop.device), perceptual, discriminator, preview)
    critic = None if discriminator is None else Critic(discriminator, recipe.critic_loss, config.critic)
    out = Path(config.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "config.json").write_text(json.dumps(dataclasses.asdict(config), indent=2) + "\n")
    except OSError as e:
        raise InputError(f"out must be a writable folder, got {out}: {e}") from e
    trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
    print(
        f"{objective.recipe}, teacher {config.teacher}: {trained / 1e6:.2f} M parameters, {size} px; "
        f"{len(dataset)} images",
        file=sys.stderr,
        flush=True,
    )
    return Trainer(student, dataset, recipe, out, config.optim, loop, provenance(config), critic).run()


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
