"""The training loop: optimiser, schedule, EMA, saved states, logs and sample pictures, in one process or many.

It knows nothing of the objective: a ``Recipe`` supplies the loss of a batch and the pictures to look at. Several
processes (torchrun) share every batch and give the curve of one, to rounding: each random draw derives from the seed
and the global sample index, and DistributedDataParallel averages the gradients of one forward pass that holds the
whole objective, the student's unroll included.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import itertools
import json
import math
import os
import resource
import sys
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn, Protocol

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from msdd_fast.backends import use_backend
from msdd_fast.errors import CheckpointError, ConfigError, InputError, TrainingError
from msdd_fast.io.files import atomic_write
from msdd_fast.io.images import save_image
from msdd_fast.tokenizer import Tokenizer
from msdd_fast.training.data.dataset import Batch, ImageDataset, MicroBatches, collate
from msdd_fast.training.loop.distributed import agree, batch_share, fail, is_first, rank, sum_over_processes, world_size
from msdd_fast.training.loop.draws import Draws
from msdd_fast.training.loop.guard import Guard, GuardConfig
from msdd_fast.training.loop.memory import prepare_blocks
from msdd_fast.training.loop.muon import Muon
from msdd_fast.training.loop.signals import StopSignals, ignore_stop_signals
from msdd_fast.training.loop.state import StateStore
from msdd_fast.training.loop.validation import Validation


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
    """Images per optimiser step, over all processes."""
    micro_batch: int | None = None
    """Images that a process works on at a time; the gradients of a step accumulate. Default: its whole share."""
    activation_checkpointing: bool = False
    """Keep only the inputs of the blocks and calculate the rest again for the backward pass: a third more time."""
    compile: bool = False
    """torch.compile of the blocks."""
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    """bfloat16 = autocast with float32 weights. On CPUs without bf16 instructions float32 is faster."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    workers: int = 2
    seed: int = 0
    log_every: int = 10
    sample_every: int = 1000
    """Steps between sample pictures and, where there is a held-out folder, its figures."""
    checkpoint_every: int = 1000
    keep: int = 2
    """Saved states that stay, besides the one with the best held-out figure."""
    strict: bool = False
    """Stop at the first picture that cannot be read, instead of taking another."""
    tensorboard: bool = False
    """Figures to OUT/tensorboard, too (needs tensorboard)."""
    guard: GuardConfig = field(default_factory=GuardConfig)


# Training is plain PyTorch where no gradient is needed, too: teacher and pictures do not depend on which kernels a
# machine has.
PLAIN = "eager,attention=sdpa,window_attention=sdpa"


class Recipe(Protocol):
    """An objective for the loop."""

    def loss(self, tokenizer: Tokenizer, images: Tensor, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of a batch, a mean over its images, and detached figures: each logged as the mean of its elements."""

    def picture(self, tokenizer: Tokenizer) -> Image.Image | None:
        """A sample grid of the averaged model."""


@dataclass(frozen=True)
class Critic:
    """A second network that learns in turn with the tokenizer: one step of its own after each of the tokenizer's."""

    module: nn.Module
    loss: Callable[[], tuple[Tensor, dict[str, Tensor]]]
    """Its loss on what the recipe has left for it in this step, and detached figures to log."""
    optim: AdamConfig


class Objective(nn.Module):
    """A loss as one forward pass of the module that it trains, as DistributedDataParallel needs it."""

    def __init__(self, module: nn.Module, loss: Callable[..., tuple[Tensor, dict[str, Tensor]]]) -> None:
        super().__init__()
        self.module, self._loss = module, loss

    def forward(self, *args: Any) -> tuple[Tensor, dict[str, Tensor]]:
        return self._loss(*args)


def parallel(objective: Objective) -> nn.Module:
    """The objective with gradients averaged over the processes, if there are several."""
    if world_size() == 1:
        return objective
    # Buffers (spectral norms' vectors) are functions of the weights, alike in all processes. The option's new name has
    # come with torch 2.13.
    names = inspect.signature(DistributedDataParallel.__init__).parameters
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
    return DistributedDataParallel(objective, gradient_as_bucket_view=True, **{buffers: False})


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
        if not muon:
            raise ConfigError("optimizer 'muon' is for matrices of transformer blocks, and there are none; use 'adamw'")
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

    Files: ``state/STEP/`` (to resume), ``log.jsonl`` (one line per ``log_every`` steps), ``samples/NNNNNN.png``,
    ``checkpoint/`` (the averaged weights, loadable with ``Tokenizer.from_pretrained``), ``unreadable.jsonl`` (pictures
    that were passed over). The newest state in ``out`` is resumed, on any number of processes; every draw derives from
    the seed and the sample, so the curve continues as if nothing had happened.

    Raises ConfigError where the batch does not divide among the processes, and CheckpointError where the newest state
    belongs to another run.
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
        validation: Validation | None = None,
    ) -> None:
        if loop.steps < 1 or loop.batch_size < 1:
            raise ConfigError(f"steps and batch_size must be at least 1, got {loop.steps} and {loop.batch_size}")
        if loop.keep < 1:
            raise ConfigError(f"keep must be at least 1, got {loop.keep}")
        self.micro, self.accumulate = agree(lambda: batch_share(loop.batch_size, loop.micro_batch))
        self.out = Path(out)
        self.optim, self.loop, self.recipe, self.dataset, self.validation = optim, loop, recipe, dataset, validation
        self.provenance = provenance or {}
        self.tokenizer = tokenizer.to(loop.device).train()
        self.ema = Ema(self.tokenizer, optim.ema_decay)
        prepare_blocks(self.tokenizer, loop.compile, loop.activation_checkpointing)
        self.optimizers = build_optimizers(self.tokenizer, optim)
        self.objective = parallel(Objective(self.tokenizer, self._loss))
        self.critic = critic
        if critic is not None:
            critic.module.to(loop.device).train()
            self.critic_optimizer = build_adamw(critic.module.parameters(), critic.optim)
            self.critic_objective = parallel(Objective(critic.module, critic.loss))
        self.step = 0
        self.guard = Guard(loop.guard)
        self.unreadable = 0
        self.best: dict[str, Any] | None = None
        self.improved = self.stopping = False
        self.stop = StopSignals()
        self._tensorboard: Any = None
        self.store = StateStore(self.out / "state", loop.keep)
        self.load_state()

    def _loss(self, images: Tensor, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        return self.recipe.loss(self.tokenizer, images, draws)

    def run(self) -> Tokenizer:
        """Train to the end; returns the averaged model.

        SIGTERM saves the state and raises SystemExit(143); the same command continues from there.
        """
        if is_first():
            (self.out / "samples").mkdir(parents=True, exist_ok=True)
        writer = nullcontext()
        if self.loop.tensorboard and is_first():
            self._tensorboard = tensorboard_writer(self.out / "tensorboard")
            writer = closing(self._tensorboard)  # or the last figures would stay in its queue
        bar = self._bar()
        start, clock, seen = time.perf_counter(), time.perf_counter(), self.step
        with self.stop, bar, writer, closing(self.batches()) as steps:
            for batches in steps:
                figures = self.train_step(batches)
                bar.update()
                if self.step % self.loop.log_every == 0:
                    now = time.perf_counter()
                    rate = (self.step - seen) * self.loop.batch_size / (now - clock)
                    clock, seen = now, self.step
                    memory = memory_gib(self.loop.device)
                    self.log({**figures, "img_per_s": rate, "memory_gib": memory, "seconds": now - start})
                    bar.set_postfix(self._progress(figures["loss"], rate, memory))
                if self._due(self.loop.sample_every):
                    self.show()
                if self._due(self.loop.checkpoint_every) or self.stopping or self.improved:
                    self.save_state()
                if self.stopping:
                    break
        if self.step < self.loop.steps:
            if is_first():
                print(f"stopped after step {self.step} and saved; the same command continues", file=sys.stderr)
            raise SystemExit(143)
        agree(self._export)
        return self.ema.model

    def _bar(self) -> tqdm[NoReturn]:
        """Progress; in a file, where each state of the bar is a line, a few a minute."""
        interval = 0.1 if sys.stderr.isatty() else 20.0
        return tqdm(
            total=self.loop.steps,
            initial=self.step,
            unit="step",
            dynamic_ncols=True,
            disable=not is_first(),
            mininterval=interval,
            maxinterval=max(10.0, interval),
        )

    def _due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.loop.steps

    def _export(self) -> None:
        if is_first():
            self.ema.model.save_pretrained(self.out / "checkpoint")

    def _progress(self, loss: float, rate: float, memory: float) -> dict[str, str]:
        line = {"loss": f"{loss:.4f}", "img/s": f"{rate:.1f}", "GiB": f"{memory:.1f}"}
        counts = {"skipped": self.guard.skipped, "unreadable": self.unreadable}
        return {**line, **{name: str(count) for name, count in counts.items() if count}}

    def batches(self) -> Generator[list[Batch], None, None]:
        """This process's micro-batches of every step from the current to the last."""
        sampler = MicroBatches(self.step, self.loop.steps, self.loop.batch_size, self.micro, rank(), world_size())
        loader = DataLoader(
            self.dataset,
            batch_sampler=sampler,
            collate_fn=collate,
            num_workers=self.loop.workers,
            pin_memory=self.loop.device.startswith("cuda"),
            worker_init_fn=ignore_stop_signals,
        )
        batches = iter(loader)
        try:
            while micro := list(itertools.islice(batches, self.accumulate)):
                yield micro
        except InputError as e:  # a worker's comes with its traceback as text
            raise InputError(str(e).strip().splitlines()[-1].split("InputError: ")[-1]) from None
        finally:  # the workers ignore SIGTERM, by which Python would end them at its exit: it would wait for ever
            if self.loop.workers:
                batches._shutdown_workers()

    def train_step(self, batches: Sequence[Batch]) -> dict[str, float]:
        """One optimiser step; advances ``self.step`` and returns figures of the whole batch, alike in all processes."""
        with use_backend(PLAIN):
            return self._train_step(batches)

    def _train_step(self, batches: Sequence[Batch]) -> dict[str, float]:
        lr = self._set_learning_rate(self.optimizers, self.optim)
        self._zero_grad(self.optimizers)
        collected: list[dict[str, Tensor]] = []
        for i, batch in enumerate(batches):
            draws = Draws(self.loop.seed, self.step, batch.samples)
            with self._synchronised(self.objective, i == len(batches) - 1):
                with self._autocast():
                    loss, figures = self.objective(batch.images.to(self.loop.device, non_blocking=True), draws)
                (loss / len(batches)).backward()
            collected.append({"loss": loss.detach(), **figures})
        norm = nn.utils.clip_grad_norm_(self.tokenizer.parameters(), self.optim.grad_clip)
        unreadable = [bad for batch in batches for bad in batch.unreadable]
        figures = self._over_processes(
            [*collected, {"grad_norm": norm}], {"unreadable": len(unreadable), "stop": float(self.stop.received)}
        )
        self.stopping = figures.pop("stop") > 0
        self.unreadable += round(figures.pop("unreadable"))
        self._note_unreadable(unreadable)
        if self._accepts(figures):
            for optimizer in self.optimizers:
                optimizer.step()
            if self.critic is not None:
                figures |= self._critic_step(self.critic)
            self.ema.update(self.tokenizer, self.step)
        self.step += 1
        return {"lr": lr, **figures, "skipped_steps": self.guard.skipped, "unreadable": self.unreadable}

    def _accepts(self, figures: dict[str, float]) -> bool:
        try:
            return self.guard.accepts(self.step, loss=figures["loss"], grad_norm=figures["grad_norm"])
        except TrainingError as e:
            fail(e)

    def _critic_step(self, critic: Critic) -> dict[str, float]:
        lr = self._set_learning_rate([self.critic_optimizer], critic.optim)
        self._zero_grad([self.critic_optimizer])
        with self._autocast():
            loss, figures = self.critic_objective()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(critic.module.parameters(), critic.optim.grad_clip)
        named = self._over_processes([{**figures, "critic_grad_norm": norm}], {})
        if math.isfinite(named["critic_grad_norm"]):
            self.critic_optimizer.step()
        return {**named, "critic_lr": lr}

    def _over_processes(self, figures: Sequence[dict[str, Tensor]], sums: dict[str, float]) -> dict[str, float]:
        """Means of the figures' elements over micro-batches and processes, and sums of the numbers in ``sums``.

        One wait for the device and one reduction, on the CPU. Elements that are absent everywhere give no figure.
        """
        names = sorted({name for part in figures for name in part})
        totals = [torch.stack([p[n].double().sum() for p in figures if n in p]).sum() for n in names]
        counts = [sum(p[n].numel() for p in figures if n in p) for n in names]
        packed = torch.tensor([*torch.stack(totals).tolist(), *counts, *sums.values()], dtype=torch.float64)
        packed = sum_over_processes(packed)
        total, count, rest = packed.split([len(names), len(names), len(sums)])
        means = {n: float(t / c) for n, t, c in zip(names, total, count, strict=True) if c}
        return {**means, **dict(zip(sums, rest.tolist(), strict=True))}

    def _note_unreadable(self, unreadable: Sequence[tuple[str, str]]) -> None:
        if not unreadable:
            return
        if self.loop.strict:
            raise InputError(f"{unreadable[0][1]} (strict)")
        with open(self.out / "unreadable.jsonl", "a") as f:
            f.writelines(json.dumps({"step": self.step + 1, "image": n, "why": w}) + "\n" for n, w in unreadable)
        for _, why in unreadable:
            tqdm.write(f"passed over: {why}", file=sys.stderr)

    def _zero_grad(self, optimizers: Iterable[torch.optim.Optimizer]) -> None:
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)

    def _synchronised(self, objective: nn.Module, last: bool) -> AbstractContextManager[Any]:
        """Gradients are averaged over the processes with the last micro-batch of a step only."""
        if last or not isinstance(objective, DistributedDataParallel):
            return nullcontext()
        return objective.no_sync()

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
        """A line of log.jsonl, by the first process."""
        if not is_first():
            return
        line = {"step": self.step, **{k: round(v, 6) for k, v in figures.items()}}
        try:
            with open(self.out / "log.jsonl", "a") as f:
                f.write(json.dumps(line) + "\n")
        except OSError as e:
            raise InputError(f"cannot write {self.out / 'log.jsonl'}: {e.strerror or e}") from e
        if self._tensorboard is not None:
            for name, value in figures.items():
                self._tensorboard.add_scalar(name, value, self.step)

    def show(self) -> None:
        """The sample picture, and the figures of the held-out images; the best of these marks its state to be kept."""
        with use_backend(PLAIN):
            self._show()

    def _show(self) -> None:
        if is_first():
            picture = self.recipe.picture(self.ema.model)
            if picture is not None:
                save_image(picture, self.out / "samples" / f"{self.step:06d}.png")
        if self.validation is None:
            return
        figures = self.validation.measure(self.ema.model)
        self.log({f"val/{name}": value for name, value in figures.items()})
        self.improved = self.best is None or figures["psnr_db"] > self.best["psnr_db"]
        if self.improved:
            self.best = {"step": self.step, **figures}

    def save_state(self) -> None:
        """Everything needed to continue, written by all processes. Raises CheckpointError if it cannot be written."""
        tensors = {f"tokenizer.{n}": t for n, t in self.tokenizer.state_dict().items()}
        tensors |= {f"ema.{n}": t for n, t in self.ema.model.state_dict().items()}
        optimizers = self._named_optimizers()
        if self.critic is not None:
            tensors |= {f"critic.{n}": t for n, t in self.critic.module.state_dict().items()}
        for name, optimizer in optimizers.items():
            for index, state in optimizer.state_dict()["state"].items():
                tensors |= {f"{name}.{index}.{key}": value for key, value in state.items()}
        facts = {
            "step": self.step,
            **self._identity(),
            "guard": self.guard.state(),
            "unreadable": self.unreadable,
            "best": self.best,
            "provenance": self.provenance,
        }
        self.store.save(self.step, tensors, facts, None if self.best is None else self.best["step"])
        self.improved = False

    def load_state(self) -> None:
        """Continue from the newest state in ``out``, if there is one."""
        if (self.out / "state.pt").exists():
            fail(
                CheckpointError(
                    f"cannot resume from {self.out / 'state.pt'}: an earlier version wrote it, with other random "
                    "numbers; choose another out folder"
                )
            )
        found = self.store.load(self._identity())
        if found is not None:
            self._take_state(*found)
        if is_first():
            for name in ("log.jsonl", "unreadable.jsonl"):
                self._cut(self.out / name)

    def _take_state(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        self.step = facts["step"]
        self.guard.load(facts["guard"])
        self.unreadable, self.best = facts["unreadable"], facts["best"]

        def part(prefix: str) -> dict[str, Tensor]:
            return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}

        self.tokenizer.load_state_dict(part("tokenizer."))
        self.ema.model.load_state_dict(part("ema."))
        if self.critic is not None:
            self.critic.module.load_state_dict(part("critic."))
        for name, optimizer in self._named_optimizers().items():
            state: dict[int, dict[str, Tensor]] = {}
            for key, tensor in part(f"{name}.").items():
                index, field_name = key.split(".")
                state.setdefault(int(index), {})[field_name] = tensor
            optimizer.load_state_dict({**optimizer.state_dict(), "state": state})

    def _identity(self) -> dict[str, Any]:
        """What a state must have in common with the run that continues from it."""
        return {
            "config": self.tokenizer.config.to_dict(),
            "seed": self.loop.seed,
            "batch_size": self.loop.batch_size,
            "optimizer": self.optim.optimizer,
            "discriminator": self.critic is not None,
        }

    def _named_optimizers(self) -> dict[str, torch.optim.Optimizer]:
        named = {f"optimizer{i}": optimizer for i, optimizer in enumerate(self.optimizers)}
        return named if self.critic is None else {**named, "critic_optimizer": self.critic_optimizer}

    def _cut(self, path: Path) -> None:
        """Drop the lines of steps that are about to be done again."""
        if not path.exists():
            return
        kept = []
        for line in path.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= self.step:
                    kept.append(line + "\n")
            except ValueError:  # cut off by a kill
                continue
        with atomic_write(path) as temporary:
            temporary.write_text("".join(kept))


def memory_gib(device: str) -> float:
    """Peak memory so far: of the GPU where there is one, else of this process."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def tensorboard_writer(folder: Path) -> Any:
    """Raises ConfigError where tensorboard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as e:
        raise ConfigError("tensorboard is not installed: pip install tensorboard, or leave it off") from e
    return SummaryWriter(str(folder))


def provenance(*configs: Any) -> dict[str, Any]:
    """The configuration of a run as plain data, for its record."""
    return {type(c).__name__: dataclasses.asdict(c) for c in configs}
