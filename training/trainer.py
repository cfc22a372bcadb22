"""The training loop: optimiser, schedule, EMA, checkpoints, logs and sample pictures.

It knows nothing of the objective: a ``Recipe`` supplies the loss of a batch and the pictures to look at.
One process; what scaling out needs is already so: every random draw derives from (seed, step) or from the
global sample index, and the state of a run is one dictionary.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from msdd_fast.errors import CheckpointError, ConfigError
from msdd_fast.images import save_image
from msdd_fast.models.tokenizer import Tokenizer
from msdd_fast.training.data import ImageDataset, ResumableSampler, hash_seed
from msdd_fast.training.muon import Muon


@dataclass(frozen=True)
class AdamConfig:
    """AdamW and its learning-rate schedule."""

    lr: float = 1e-4
    """Peak learning rate."""
    warmup_steps: int = 500
    min_lr_ratio: float = 0.1
    """The cosine ends at this fraction of ``lr``."""
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    """Decoupled; applied to matrices only."""
    grad_clip: float = 1.0


@dataclass(frozen=True)
class OptimConfig(AdamConfig):
    """Optimiser of the tokenizer, and the average of its weights."""

    optimizer: Literal["adamw", "muon"] = "adamw"
    """"muon" orthogonalises the updates of the blocks' matrices; all other parameters stay with AdamW."""
    ema_decay: float = 0.9999
    """Upper bound; early on the average follows at (1 + step) / (10 + step)."""


@dataclass(frozen=True)
class LoopConfig:
    """How long to train, on what device, and what to write when."""

    steps: int = 100_000
    batch_size: int = 32
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    """bfloat16 = autocast with float32 weights. On CPUs without bf16 instructions float32 is faster."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    workers: int = 2
    seed: int = 0
    log_every: int = 10
    sample_every: int = 1000
    checkpoint_every: int = 1000


class Recipe(Protocol):
    """An objective for the loop."""

    def loss(
        self, tokenizer: Tokenizer, images: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of a batch and detached figures to log."""

    def picture(self, tokenizer: Tokenizer) -> Image.Image | None:
        """A sample grid of the averaged model."""


@dataclass(frozen=True)
class Critic:
    """A second network that learns in turn with the tokenizer: one step of its own after each of the tokenizer's."""

    module: nn.Module
    loss: Callable[[torch.Generator], tuple[Tensor, dict[str, Tensor]]]
    """Its loss on what the recipe's last loss has left for it, and detached figures to log."""
    optim: AdamConfig


class Ema:
    """Exponential moving average of the weights, as a model of its own."""

    def __init__(self, model: Tokenizer, decay: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, model: Tokenizer, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        for average, parameter in zip(self.model.parameters(), model.parameters(), strict=True):
            average.lerp_(parameter, 1.0 - decay)


def learning_rate_factor(step: int, total: int, config: AdamConfig) -> float:
    """Linear warm-up, then a cosine to ``min_lr_ratio``."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, total - config.warmup_steps)
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    return config.min_lr_ratio + (1.0 - config.min_lr_ratio) * cosine


def build_optimizers(model: Tokenizer, config: OptimConfig) -> list[torch.optim.Optimizer]:
    """AdamW alone, or Muon for the blocks' matrices beside AdamW for the rest."""
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    muon: list[nn.Parameter] = []
    if config.optimizer == "muon":
        # adaLN matrices start at zero and act on one slowly varying vector: they stay with AdamW.
        muon = [p for name, p in trainable if p.ndim == 2 and ".blocks." in name and ".adaln." not in name]
    rest = [p for _, p in trainable if all(p is not m for m in muon)]
    optimizers: list[torch.optim.Optimizer] = [build_adamw(rest, config)]
    if muon:
        optimizers.append(Muon(muon, lr=config.lr, weight_decay=config.weight_decay))
    return optimizers


def build_adamw(parameters: Iterable[nn.Parameter], config: AdamConfig) -> torch.optim.AdamW:
    """AdamW that decays matrices only."""
    parameters = list(parameters)
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas)


class Trainer:
    """Runs a recipe for ``loop.steps`` steps and keeps everything under ``out``.

    Files: ``state.pt`` (resume), ``log.jsonl`` (one line per ``log_every`` steps), ``samples/NNNNNN.png``,
    ``checkpoint/`` (the averaged weights, loadable with ``Tokenizer.from_pretrained``). An existing
    ``state.pt`` is resumed; every draw derives from the seed and the step, so the curve continues as if
    nothing had happened.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        dataset: ImageDataset,
        recipe: Recipe,
        out: str | os.PathLike[str],
        optim: OptimConfig,
        loop: LoopConfig,
        provenance: dict[str, Any] | None = None,
        critic: Critic | None = None,
    ) -> None:
        if loop.steps < 1 or loop.batch_size < 1:
            raise ConfigError(f"steps and batch_size must be at least 1, got {loop.steps} and {loop.batch_size}")
        self.out = Path(out)
        self.optim, self.loop, self.recipe, self.dataset = optim, loop, recipe, dataset
        self.provenance = provenance or {}
        self.tokenizer = tokenizer.to(loop.device).train()
        self.ema = Ema(self.tokenizer, optim.ema_decay)
        self.optimizers = build_optimizers(self.tokenizer, optim)
        self.critic = critic
        if critic is not None:
            critic.module.to(loop.device).train()
            self.critic_optimizer = build_adamw(critic.module.parameters(), critic.optim)
        self.step = 0
        if (self.out / "state.pt").exists():
            self.load_state()

    def run(self) -> Tokenizer:
        """Train to the end; returns the averaged model."""
        (self.out / "samples").mkdir(parents=True, exist_ok=True)
        bar = tqdm(total=self.loop.steps, initial=self.step, unit="step", dynamic_ncols=True)
        first, clock = self.step, time.perf_counter()
        for images in self.batches():
            figures = self.train_step(images)
            bar.update()
            if self.step % self.loop.log_every == 0:
                done = (self.step - first) * self.loop.batch_size
                rate = done / (time.perf_counter() - clock)
                self.log({**figures, "img_per_s": rate, "seconds": time.perf_counter() - clock})
                bar.set_postfix(loss=f"{figures['loss']:.4f}", img_s=f"{rate:.1f}")
            if self.step % self.loop.sample_every == 0:
                self.save_picture()
            if self.step % self.loop.checkpoint_every == 0:
                self.save_state()
        bar.close()
        if self.step % self.loop.checkpoint_every:
            self.save_state()
        self.ema.model.save_pretrained(self.out / "checkpoint")
        self.save_picture()
        return self.ema.model

    def batches(self) -> Iterator[Tensor]:
        """Batches from the current step to the last, by global sample index."""
        size = self.loop.batch_size
        loader: Iterable[Tensor] = DataLoader(
            self.dataset,
            batch_size=size,
            sampler=ResumableSampler(self.step * size, self.loop.steps * size),
            num_workers=self.loop.workers,
            pin_memory=self.loop.device.startswith("cuda"),
        )
        for images in loader:
            yield images.to(self.loop.device, non_blocking=True)

    def train_step(self, images: Tensor) -> dict[str, float]:
        """One optimiser step; advances ``self.step`` and returns figures."""
        lr = self._set_learning_rate(self.optimizers, self.optim)
        generator = torch.Generator().manual_seed(hash_seed(self.loop.seed, self.step, 1))
        with self._autocast():
            loss, figures = self.recipe.loss(self.tokenizer, images, generator)
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.tokenizer.parameters(), self.optim.grad_clip)
        for optimizer in self.optimizers:
            optimizer.step()
        if self.critic is not None:
            figures = {**figures, **self._critic_step(self.critic, generator)}
        self.ema.update(self.tokenizer, self.step)
        self.step += 1
        named = {"loss": loss.detach(), "grad_norm": norm, **figures}
        return {"lr": lr, **{name: float(value) for name, value in named.items()}}

    def _critic_step(self, critic: Critic, generator: torch.Generator) -> dict[str, Tensor]:
        lr = self._set_learning_rate([self.critic_optimizer], critic.optim)
        with self._autocast():
            loss, figures = critic.loss(generator)
        self.critic_optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(critic.module.parameters(), critic.optim.grad_clip)
        self.critic_optimizer.step()
        return {**figures, "critic_lr": torch.tensor(lr), "critic_grad_norm": norm}

    def _set_learning_rate(self, optimizers: Iterable[torch.optim.Optimizer], config: AdamConfig) -> float:
        lr = config.lr * learning_rate_factor(self.step, self.loop.steps, config)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
        return lr

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.loop.precision == "float32":
            return nullcontext()
        return torch.autocast(torch.device(self.loop.device).type, dtype=torch.bfloat16)

    def log(self, figures: dict[str, float]) -> None:
        line = {"step": self.step, **{k: round(v, 6) for k, v in figures.items()}}
        with open(self.out / "log.jsonl", "a") as f:
            f.write(json.dumps(line) + "\n")

    def save_picture(self) -> None:
        picture = self.recipe.picture(self.ema.model)
        if picture is not None:
            save_image(picture, self.out / "samples" / f"{self.step:06d}.png")

    def save_state(self) -> None:
        """Everything needed to continue, written atomically."""
        path = self.out / "state.pt"
        state = {
            "step": self.step,
            "tokenizer": self.tokenizer.state_dict(),
            "ema": self.ema.model.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
            "config": self.tokenizer.config.to_dict(),
            "seed": self.loop.seed,
            "provenance": self.provenance,
        }
        if self.critic is not None:
            state["critic"] = self.critic.module.state_dict()
            state["critic_optimizer"] = self.critic_optimizer.state_dict()
        temporary = path.with_suffix(".tmp")
        torch.save(state, temporary)
        os.replace(temporary, path)

    def load_state(self) -> None:
        """Continue the run in ``out``. Raises CheckpointError if it is damaged or of another model or seed."""
        path = self.out / "state.pt"
        try:
            state = torch.load(path, map_location=self.loop.device, weights_only=True)
        except Exception as e:  # torch.load raises many types for a damaged file
            raise CheckpointError(f"cannot resume from {path}: {e}") from e
        for name, mine in (("config", self.tokenizer.config.to_dict()), ("seed", self.loop.seed)):
            if state.get(name) != mine:
                raise CheckpointError(
                    f"cannot resume from {path}: its {name} is not this run's; choose another out folder"
                )
        if ("critic" in state) != (self.critic is not None):
            raise CheckpointError(
                f"cannot resume from {path}: one of the two runs has a discriminator; choose another out folder"
            )
        self.step = state["step"]
        self.tokenizer.load_state_dict(state["tokenizer"])
        self.ema.model.load_state_dict(state["ema"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        if self.critic is not None:
            self.critic.module.load_state_dict(state["critic"])
            self.critic_optimizer.load_state_dict(state["critic_optimizer"])


def provenance(*configs: Any) -> dict[str, Any]:
    """The configuration of a run as plain data, for its record."""
    return {type(c).__name__: dataclasses.asdict(c) for c in configs}
