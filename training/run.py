"""The training programs by name, and what all of them do alike: data, folder, validation, preview, loop."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from msdd_fast.errors import ConfigError, InputError
from msdd_fast.io.images import find_image_files, load_batch
from msdd_fast.io.json_files import write_json
from msdd_fast.metrics.vgg19 import Vgg19Distance
from msdd_fast.tokenizer import Tokenizer
from msdd_fast.training.config import RunConfig
from msdd_fast.training.data.crop import CropConfig
from msdd_fast.training.data.dataset import ImageDataset
from msdd_fast.training.data.sources import ImageRefs, find_images
from msdd_fast.training.loop.distributed import (
    is_rank0,
    on_all_ranks,
    on_rank0_and_broadcast,
    process_group,
    world_size,
)
from msdd_fast.training.loop.lock import RunLock
from msdd_fast.training.loop.trainer import Trainer
from msdd_fast.training.loop.validation import Validation

Command = Literal["train", "distill"]


@dataclass(frozen=True)
class TrainSpec:
    """A training program.

    Attributes:
        name: unique.
        family: of the tokenizers that it trains, as in ``config.family``.
        command: of ``msdd-fast``.
        config: "MODULE:CLASS" of its ``RunConfig``, imported when it is needed.
    """

    name: str
    family: str
    command: Command
    config: str

    def load(self) -> type[RunConfig]:
        """The class of its configuration."""
        module, _, name = self.config.partition(":")
        kind: type[RunConfig] = getattr(importlib.import_module(module), name)
        return kind


_RECIPES = "msdd_fast.training.recipes"
RECIPES: dict[str, TrainSpec] = {
    spec.name: spec
    for spec in (
        TrainSpec("msdd-stage1", "msdd", "train", f"{_RECIPES}.msdd_stage1:MSDDTrainConfig"),
        TrainSpec("msdd-stage2", "msdd", "distill", f"{_RECIPES}.msdd_stage2:MSDDDistillConfig"),
        TrainSpec("ssdd-flow", "ssdd", "train", f"{_RECIPES}.ssdd_flow:SSDDTrainConfig"),
        TrainSpec("ssdd-distill", "ssdd", "distill", f"{_RECIPES}.ssdd_distill:SSDDDistillConfig"),
    )
}


def find_spec(command: Command, family: str | None = None) -> TrainSpec:
    """The program of ``command`` for a family; None: the first one. Raises ConfigError if there is none."""
    specs = [spec for spec in RECIPES.values() if spec.command == command]
    for spec in specs:
        if family in (None, spec.family):
            return spec
    known = ", ".join(spec.family for spec in specs)
    raise ConfigError(f"msdd-fast {command} has no recipe for the family {family}; it has one for {known}")


def train(config: RunConfig) -> Tokenizer:
    """Run a training program; the averaged model is returned and also at ``out``/checkpoint.

    Under torchrun this is one of its processes. Raises ConfigError, CheckpointError or InputError for whatever can be
    known before the first step.
    """
    with process_group(config.loop.device) as device:
        config = dataclasses.replace(config, loop=dataclasses.replace(config.loop, device=device))
        return make_trainer(config).run()


def make_trainer(config: RunConfig) -> Trainer:
    """The trainer of ``config``, ready to run. Errors in the configuration are raised before anything is written."""
    built = on_all_ranks(config.build)
    size, device = built.tokenizer.config.image_size, config.loop.device
    dataset = make_dataset(config, size)

    def finish() -> tuple[Tensor, Validation | None, RunLock | None]:
        preview, validation = preview_images(config, dataset, size).to(device), make_validation(config, size)
        return preview, validation, make_folder(config)

    preview, validation, lock = on_all_ranks(finish)
    if is_rank0():
        count = sum(p.numel() for p in built.tokenizer.parameters() if p.requires_grad)
        print(
            f"{built.title}: {count / 1e6:.2f} M parameters, {size} px; {len(dataset)} images; "
            f"{world_size()} process{'es' if world_size() > 1 else ''}",
            file=sys.stderr,
            flush=True,
        )
    trainer = Trainer(
        built.tokenizer,
        dataset,
        built.recipe,
        config.out,
        config.optim,
        config.loop,
        provenance=provenance(config),
        critic=built.critic,
        validation=validation,
        preview=preview,
    )
    del lock  # the trainer has it now
    return trainer


def make_dataset(config: RunConfig, size: int) -> ImageDataset:
    """The training data, listed by rank 0 for all."""
    crop = CropConfig(config.crop, config.min_crop, config.resize, config.flip)
    refs = on_rank0_and_broadcast(lambda: ImageRefs(find_images(config.data, config.cache)))
    return ImageDataset(refs, size, config.loop.seed, crop)


def make_validation(config: RunConfig, size: int) -> Validation | None:
    """The held-out images, if there are any."""
    if config.val is None:
        return None
    distance = Vgg19Distance(config.vgg19).to(config.loop.device) if config.vgg19 else None
    return Validation(find_image_files(config.val), size, config.loop.device, distance)


def preview_images(config: RunConfig, dataset: ImageDataset, size: int) -> Tensor:
    """The first eight images of ``config.preview``, or the first four training images: (B, 3, size, size)."""
    if config.preview is None:
        return torch.stack([dataset[i] for i in range(min(4, len(dataset)))])
    return load_batch(find_image_files(config.preview)[:8], size)


def make_folder(config: RunConfig) -> RunLock | None:
    """Make the folder of the run and its config.json, on rank 0; the lock that keeps other runs out of it.

    Raises InputError if it cannot be written or another run is writing into it.
    """
    if not is_rank0():
        return None
    out, content = Path(config.out), dataclasses.asdict(config)
    if world_size() > 1:
        content["loop"]["device"] = config.loop.device.split(":")[0]  # every process has its own
    try:
        lock = RunLock.take(out)
        write_json(out / "config.json", content)
    except OSError as e:
        raise InputError(f"out must be a writable folder, got {out}: {e}") from e
    return lock


def provenance(config: RunConfig) -> dict[str, Any]:
    """The configuration as plain data, for the record in a state."""
    return {type(config).__name__: dataclasses.asdict(config)}
