"""The stage-1 training program: configuration in, checkpoint out. ``msdd-fast train`` is its command line."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from msdd_fast.config import get_preset
from msdd_fast.errors import InputError
from msdd_fast.images import center_crop, find_image_files, load_image, to_tensor
from msdd_fast.metrics import Vgg19Distance
from msdd_fast.models.tokenizer import Tokenizer
from msdd_fast.training.data import ImageDataset, find_images
from msdd_fast.training.stage1 import Stage1Config, Stage1Recipe
from msdd_fast.training.trainer import LoopConfig, OptimConfig, Trainer, provenance


@dataclass(frozen=True)
class TrainConfig:
    """Stage-1 training of encoder and decoder (SPEC A5)."""

    data: tuple[str, ...]
    """Image folders and .tar shards."""
    out: str
    """Folder of the run; an interrupted run in it is continued."""
    preset: str = "msdd-nano"
    """Model: a preset name."""
    image_size: int | None = None
    """Pixels per side, if not the preset's."""
    num_stages: int | None = None
    """Scales, each half the next one's resolution, if not the preset's; 1 is ordinary single-scale flow matching."""
    min_crop: float = 0.8
    """Random square crops take this much to all of the shorter side."""
    flip: bool = True
    preview: str | None = None
    """Folder or picture for the sample grids (default: the first training images)."""
    vgg19: str | None = None
    """vgg_normalised_conv3_1.pth, needed when perceptual_weight > 0."""
    objective: Stage1Config = field(default_factory=Stage1Config)
    optim: OptimConfig = field(default_factory=OptimConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)


def train_stage1(config: TrainConfig) -> Tokenizer:
    """Train, and return the averaged model; it is also at ``out``/checkpoint."""
    model_config = get_preset(config.preset)
    if config.image_size is not None:
        model_config = dataclasses.replace(model_config, image_size=config.image_size)
    if config.num_stages is not None:
        schedule = dataclasses.replace(model_config.schedule, num_stages=config.num_stages)
        model_config = dataclasses.replace(model_config, schedule=schedule)
    size = model_config.image_size
    dataset = ImageDataset(find_images(config.data), size, config.loop.seed, config.min_crop, config.flip)
    preview = preview_images(config.preview, dataset, size)
    perceptual = Vgg19Distance(config.vgg19).to(config.loop.device) if config.vgg19 else None
    recipe = Stage1Recipe(config.objective, preview.to(config.loop.device), perceptual)
    out = Path(config.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "config.json").write_text(json.dumps(dataclasses.asdict(config), indent=2) + "\n")
    except OSError as e:
        raise InputError(f"out must be a writable folder, got {out}: {e}") from e
    torch.manual_seed(config.loop.seed)
    tokenizer = Tokenizer(model_config)
    count = sum(p.numel() for p in tokenizer.parameters())
    print(f"{config.preset}: {count / 1e6:.2f} M parameters, {size} px; {len(dataset)} images", flush=True)
    record = provenance(config)
    return Trainer(tokenizer, dataset, recipe, out, config.optim, config.loop, record).run()


def preview_images(source: str | None, dataset: ImageDataset, size: int) -> Tensor:
    """Up to eight pictures of a folder, or the first four of the training data: (B, 3, size, size)."""
    if source is None:
        return torch.stack([dataset[i] for i in range(min(4, len(dataset)))])
    return torch.stack([to_tensor(center_crop(load_image(f), size)) for f in find_image_files(source)[:8]])
