"""SSDD's training programs: ``msdd-fast train`` with an SSDD preset, ``msdd-fast distill`` with an SSDD teacher."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass, field

import torch

from msdd_fast.errors import ConfigError
from msdd_fast.families import get_preset
from msdd_fast.families.ssdd.config import SSDDConfig
from msdd_fast.tokenizer import Tokenizer
from msdd_fast.training.loop.distributed import agree, is_first, process_group, world_size
from msdd_fast.training.loop.trainer import OptimConfig, Trainer, provenance
from msdd_fast.training.losses.perceptual import PerceptualName, make_perceptual
from msdd_fast.training.recipes.ssdd import SSDDDistillation, SSDDObjective, SSDDRecipe, one_step_student, trainable
from msdd_fast.training.run import RunConfig, make_dataset, make_folder, make_validation, preview_images


@dataclass(frozen=True)
class SSDDRunConfig(RunConfig):
    """What both programs are told; defaults are the authors' where they are known (docs/spec.md#ssdd-training)."""

    perceptual: PerceptualName = "lpips-vgg"
    """Network of the perceptual loss. "random" is untrained, for tests only."""
    objective: SSDDObjective = field(default_factory=SSDDObjective)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(grad_clip=0.1, ema_decay=0.999))


@dataclass(frozen=True)
class SSDDTrainConfig(SSDDRunConfig):
    """Flow matching of an SSDD tokenizer (docs/spec.md#ssdd-training)."""

    preset: str = "ssdd-s-f8c4"
    """Model: a preset name."""
    start: str | None = None
    """Checkpoint to start from, in place of the preset with random weights."""
    image_size: int | None = None
    """Side of the square crops to train on, if not the model's."""


@dataclass(frozen=True, kw_only=True)
class SSDDDistillConfig(SSDDRunConfig):
    """Distillation of an SSDD tokenizer into one step (docs/spec.md#ssdd-training)."""

    teacher: str
    """Trained SSDD tokenizer: a directory or a hub id. The student starts as its copy; its encoder stays as it is."""


def train_ssdd(config: SSDDTrainConfig | SSDDDistillConfig) -> Tokenizer:
    """Train, and return the averaged model; it is also at ``out``/checkpoint. Under torchrun, one of its processes.

    Raises ConfigError, CheckpointError or InputError, each before the first step.
    """
    with process_group(config.loop.device) as device:
        config = dataclasses.replace(config, loop=dataclasses.replace(config.loop, device=device))
        return make_trainer(config).run()


def make_trainer(config: SSDDTrainConfig | SSDDDistillConfig) -> Trainer:
    """The trainer of ``config``, ready to run; raises every error of the configuration, once for all processes."""
    loop, objective = config.loop, config.objective
    source = agree(lambda: _tokenizer(config))
    size = source.config.image_size
    dataset = make_dataset(config, size)

    def recipe() -> SSDDRecipe | SSDDDistillation:
        perceptual = None
        if objective.perceptual_weight > 0:
            perceptual = make_perceptual(config.perceptual, config.vgg19, config.vgg16, config.lpips_heads)
            perceptual = perceptual.to(loop.device)
        preview = preview_images(config.preview, dataset, size).to(loop.device)
        if isinstance(config, SSDDTrainConfig):
            made = SSDDRecipe(objective, preview, perceptual)
        else:
            made = SSDDDistillation(objective, source.to(loop.device), preview, perceptual)
        make_folder(config)
        return made

    made, validation = agree(lambda: (recipe(), make_validation(config, size)))
    distils = isinstance(config, SSDDDistillConfig)
    tokenizer = one_step_student(source) if distils else trainable(source, objective)
    if is_first():
        count = sum(p.numel() for p in tokenizer.parameters() if p.requires_grad)
        print(
            f"{'distillation' if distils else 'flow matching'}: {count / 1e6:.2f} M parameters, {size} px; "
            f"{len(dataset)} images; {world_size()} process{'es' if world_size() > 1 else ''}",
            file=sys.stderr,
            flush=True,
        )
    return Trainer(tokenizer, dataset, made, config.out, config.optim, loop, provenance(config), None, validation)


def _tokenizer(config: SSDDTrainConfig | SSDDDistillConfig) -> Tokenizer:
    """The teacher, or what training starts from."""
    if isinstance(config, SSDDDistillConfig):
        return _load(config.teacher, "teacher")
    torch.manual_seed(config.loop.seed)
    if config.start is not None:
        tokenizer = _load(config.start, "start")
    else:
        preset = get_preset(config.preset)
        if not isinstance(preset, SSDDConfig):
            raise ConfigError(f"preset must be of the family ssdd, got {config.preset}")
        tokenizer = Tokenizer(preset)
    if config.image_size is not None:
        tokenizer.config = dataclasses.replace(tokenizer.config, image_size=config.image_size)
    return tokenizer


def _load(path: str, name: str) -> Tokenizer:
    tokenizer = Tokenizer.from_pretrained(path)
    if tokenizer.config.family != "ssdd":
        raise ConfigError(f"{name} must be of the family ssdd, got {path}")
    return tokenizer
