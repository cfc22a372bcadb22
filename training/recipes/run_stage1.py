"""The stage-1 training program: configuration in, checkpoint out. ``msdd-fast train`` is its command line."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass, field

import torch

from msdd_fast.errors import ConfigError
from msdd_fast.families import get_preset
from msdd_fast.families.msdd.config import TokenizerConfig
from msdd_fast.tokenizer import Tokenizer
from msdd_fast.training.loop.distributed import agree, is_first, process_group, world_size
from msdd_fast.training.loop.trainer import Trainer, provenance
from msdd_fast.training.losses.perceptual import make_perceptual
from msdd_fast.training.recipes.stage1 import Stage1Config, Stage1Recipe
from msdd_fast.training.run import RunConfig, make_dataset, make_folder, make_validation, preview_images


@dataclass(frozen=True)
class TrainConfig(RunConfig):
    """Stage-1 training of encoder and decoder (docs/spec.md#stage1-loss)."""

    preset: str = "msdd-nano"
    """Model: a preset name."""
    image_size: int | None = None
    """Pixels per side, if not the preset's."""
    num_stages: int | None = None
    """Scales, each half the next one's resolution, if not the preset's; 1 is ordinary single-scale flow matching."""
    objective: Stage1Config = field(default_factory=Stage1Config)


def train_stage1(config: TrainConfig) -> Tokenizer:
    """Train, and return the averaged model; it is also at ``out``/checkpoint. Under torchrun, one of its processes."""
    with process_group(config.loop.device) as device:
        config = dataclasses.replace(config, loop=dataclasses.replace(config.loop, device=device))
        return make_trainer(config).run()


def make_trainer(config: TrainConfig) -> Trainer:
    """The trainer of ``config``, ready to run; raises every error of the configuration, once for all processes."""

    def model() -> TokenizerConfig:
        made = get_preset(config.preset)
        if not isinstance(made, TokenizerConfig):
            raise ConfigError(f"preset must be of the family msdd, got {config.preset}")
        if config.image_size is not None:
            made = dataclasses.replace(made, image_size=config.image_size)
        if config.num_stages is not None:
            made = dataclasses.replace(made, schedule=dataclasses.replace(made.schedule, num_stages=config.num_stages))
        return made

    model_config = agree(model)
    size, device = model_config.image_size, config.loop.device
    dataset = make_dataset(config, size)

    def recipe() -> Stage1Recipe:
        perceptual = None
        if config.objective.perceptual_weight > 0:
            perceptual = make_perceptual(config.perceptual, config.vgg19, config.vgg16, config.lpips_heads).to(device)
        preview = preview_images(config.preview, dataset, size)
        make_folder(config)
        return Stage1Recipe(config.objective, preview.to(device), perceptual)

    made, validation = agree(lambda: (recipe(), make_validation(config, size)))
    torch.manual_seed(config.loop.seed)
    tokenizer = Tokenizer(model_config)
    if is_first():
        count = sum(p.numel() for p in tokenizer.parameters())
        print(
            f"{config.preset}: {count / 1e6:.2f} M parameters, {size} px; {len(dataset)} images; "
            f"{world_size()} process{'es' if world_size() > 1 else ''}",
            file=sys.stderr,
            flush=True,
        )
    return Trainer(
        tokenizer, dataset, made, config.out, config.optim, config.loop, provenance(config), None, validation
    )
