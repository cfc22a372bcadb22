"""The training loop, in one process or several.

It knows nothing of the objective: a ``Recipe`` supplies the loss of a batch and the columns of the sample grids.
Several processes (torchrun) share every batch and give the curve of one, up to rounding: every random number derives
from the seed and the global sample index, and DistributedDataParallel averages the gradients of one forward pass that
contains the whole objective, the unrolled student included.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import sys
from collections.abc import Generator, Iterable, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from msdd_fast.backends import use_backend
from msdd_fast.errors import CheckpointError, InputError, TrainingError
from msdd_fast.io.images import preview_grid, save_image
from msdd_fast.tokenizer import Tokenizer
from msdd_fast.training.data.dataset import ImageDataset
from msdd_fast.training.data.loader import Batch, step_batches
from msdd_fast.training.loop.config import LoopConfig, OptimConfig
from msdd_fast.training.loop.distributed import (
    batch_share,
    is_rank0,
    on_all_ranks,
    raise_on_rank0,
    sum_over_processes,
)
from msdd_fast.training.loop.draws import Draws
from msdd_fast.training.loop.ema import Ema
from msdd_fast.training.loop.guard import Guard
from msdd_fast.training.loop.lock import RunLock
from msdd_fast.training.loop.log import Clock, RunLog, progress_bar, progress_values
from msdd_fast.training.loop.memory import prepare_blocks
from msdd_fast.training.loop.objective import Critic, Loss, Objective, Recipe, distribute
from msdd_fast.training.loop.optimizers import build_adamw, build_optimizers, set_learning_rate
from msdd_fast.training.loop.precision import autocast, plain_attention
from msdd_fast.training.loop.signals import StopSignals
from msdd_fast.training.loop.state import StateStore, is_count, is_number
from msdd_fast.training.loop.validation import Validation

# Even gradient-free passes use plain PyTorch, so results do not depend on the machine's kernels.
PLAIN = "eager,attention=sdpa,window_attention=sdpa"

log = logging.getLogger(__name__)


class Trainer:
    """Trains a tokenizer for ``loop.steps`` steps and keeps everything under ``out``.

    Files: ``state/STEP/`` (to resume), ``log.jsonl`` (the first step, every ``log_every``-th and the last),
    ``samples/NNNNNN.png``,
    ``checkpoint/`` (the averaged weights, for ``Tokenizer.from_pretrained``), ``unreadable.jsonl`` (skipped images).
    The newest state in ``out`` is resumed, on any number of processes.

    Args:
        tokenizer: trained in place; parameters without ``requires_grad`` stay as they are.
        dataset: training images.
        recipe: the objective.
        out: folder of the run.
        optim, loop: configuration.
        provenance: plain data that every state records.
        critic: a second network that learns in turn.
        validation: held-out images, measured every ``sample_every`` steps.
        preview: images (B, 3, H, W) in [-1, 1] of the sample grids.

    Raises ConfigError if the batch does not divide among the processes, CheckpointError if the newest state belongs to
    another run, InputError if a run of another process is writing into ``out``.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        dataset: ImageDataset,
        recipe: Recipe,
        out: str | os.PathLike[str],
        optim: OptimConfig,
        loop: LoopConfig,
        *,
        provenance: dict[str, Any] | None = None,
        critic: Critic | None = None,
        validation: Validation | None = None,
        preview: Tensor | None = None,
    ) -> None:
        self.micro, self.accumulate = on_all_ranks(lambda: batch_share(loop.batch_size, loop.micro_batch))
        self.out = Path(out)
        self._lock = on_all_ranks(lambda: RunLock.take(self.out) if is_rank0() else None)
        self.optim, self.loop, self.recipe, self.dataset = optim, loop, recipe, dataset
        self.validation, self.preview, self.provenance = validation, preview, provenance or {}
        self.tokenizer = tokenizer.to(loop.device).train()
        self.ema = Ema(self.tokenizer, optim.ema_decay)
        prepare_blocks(self.tokenizer, loop.compile, loop.activation_checkpointing)
        self.optimizers = build_optimizers(self.tokenizer, optim)
        self.objective = distribute(Objective(self.tokenizer, self._loss))
        self.critic = critic
        if critic is not None:
            critic.module.to(loop.device).train()
            self.critic_optimizer = build_adamw(critic.module.parameters(), critic.optim)
            self.critic_objective = distribute(Objective(critic.module, critic.loss))
        self.step = 0
        self.guard = Guard(loop.guard)
        self.unreadable = 0
        self.best: dict[str, Any] | None = None
        self.improved = False
        self.stopping = 0
        self.stop = StopSignals()
        self.log = RunLog(self.out, loop.tensorboard)
        self.store = StateStore(self.out / "state", loop.keep)
        self.load_state()

    def _loss(self, images: Tensor, draws: Draws) -> Loss | tuple[Tensor, dict[str, Tensor]]:
        return self.recipe.loss(self.tokenizer, images, draws)

    def run(self) -> Tokenizer:
        """Train to the end and return the averaged model.

        SIGTERM saves the state and raises SystemExit(143); the same command continues from there. So does Ctrl-C, with
        130; a second one raises KeyboardInterrupt at once.
        """
        if is_rank0():
            (self.out / "samples").mkdir(parents=True, exist_ok=True)
        bar, clock = progress_bar(self.step, self.loop.steps), Clock(self.step, self.loop.batch_size, self.loop.device)
        with self.stop, bar, self.log.opened(), closing(self.batches()) as steps:
            if self.step and self._due(self.loop.sample_every):
                self.show()  # the state was saved before
                if self.improved:
                    self._keep_best(saved=True)
            for batches in steps:
                metrics = self.train_step(batches)
                bar.update()
                if self._due(self.loop.log_every) or (self.step == 1 and self.loop.log_every):
                    metrics |= clock.lap(self.step)
                    self.log.write(self.step, metrics)
                    bar.set_postfix(progress_values(metrics))
                # Before the pictures and the validation: whatever fails there, the steps are not lost.
                saved = self._due(self.loop.checkpoint_every) or self.stopping > 0
                if saved:
                    self.save_state()
                if self._due(self.loop.sample_every):
                    self.show()
                if self.improved and self.loop.checkpoint_every:
                    self._keep_best(saved)
                if self.stopping:
                    break
        if self.step < self.loop.steps:
            if is_rank0():
                print(f"stopped after step {self.step} and saved; the same command continues", file=sys.stderr)
            raise SystemExit(128 + self.stopping)
        on_all_ranks(self._export)
        self._lock = None
        return self.ema.model

    def _due(self, every: int) -> bool:
        """Whether something that happens every so many steps, and after the last, happens now; 0: never."""
        return every > 0 and (self.step % every == 0 or self.step == self.loop.steps)

    def _keep_best(self, saved: bool) -> None:
        """Have the state of this step, whose validation is the best so far, kept."""
        if saved:
            self.store.prune(self.step, self.step)
        else:
            self.save_state()
        self.improved = False

    def _export(self) -> None:
        if is_rank0():
            self.ema.model.save_pretrained(self.out / "checkpoint")

    def batches(self) -> Generator[list[Batch], None, None]:
        """This process's micro-batches of every step from the current to the last."""
        on_gpu = self.loop.device.startswith("cuda")
        steps = range(self.step, self.loop.steps)
        return step_batches(self.dataset, steps, self.loop.batch_size, self.micro, self.loop.workers, on_gpu)

    def train_step(self, batches: Sequence[Batch]) -> dict[str, float]:
        """One optimiser step on this process's micro-batches; advances ``self.step``.

        Returns metrics of the whole batch, equal in all processes.
        """
        with use_backend(PLAIN), plain_attention(self.loop):
            return self._train_step(batches)

    def _train_step(self, batches: Sequence[Batch]) -> dict[str, float]:
        lr = set_learning_rate(self.optimizers, self.step, self.loop.steps, self.optim)
        _zero_grad(self.optimizers)
        collected: list[dict[str, Tensor]] = []
        for_critic: list[Any] = []
        for i, batch in enumerate(batches):
            draws = Draws(self.loop.seed, self.step, batch.samples)
            with _synchronised(self.objective, i == len(batches) - 1):
                with autocast(self.loop):
                    loss = self.objective(batch.images.to(self.loop.device, non_blocking=True), draws)
                (loss.value / len(batches)).backward()
            collected.append({"loss": loss.value.detach(), **loss.metrics})
            for_critic.append(loss.for_critic)
        norm = nn.utils.clip_grad_norm_(self.tokenizer.parameters(), self.optim.grad_clip or math.inf)
        unreadable = [bad for batch in batches for bad in batch.unreadable]
        metrics = _mean_over_batch(
            [*collected, {"grad_norm": norm}],
            {
                "unreadable": len(unreadable),
                "terminated": self.stop.received == signal.SIGTERM,
                "interrupted": self.stop.received == signal.SIGINT,
            },
        )
        terminated, interrupted = metrics.pop("terminated") > 0, metrics.pop("interrupted") > 0
        self.stopping = int(signal.SIGTERM if terminated else signal.SIGINT if interrupted else 0)
        self.unreadable += round(metrics.pop("unreadable"))
        if unreadable and self.loop.strict:
            raise InputError(f"{unreadable[0][1]} (strict)")
        self.log.write_unreadable(self.step + 1, unreadable)
        if self._accepts(metrics):
            for optimizer in self.optimizers:
                optimizer.step()
            if self.critic is not None:
                metrics |= self._critic_step(self.critic, for_critic)
            self.ema.update(self.tokenizer, self.step)
        self.step += 1
        return {"lr": lr, **metrics, "skipped_steps": self.guard.skipped, "unreadable": self.unreadable}

    def _accepts(self, metrics: dict[str, float]) -> bool:
        try:
            return self.guard.accepts(self.step, loss=metrics["loss"], grad_norm=metrics["grad_norm"])
        except TrainingError as e:
            raise_on_rank0(e)

    def _critic_step(self, critic: Critic, for_critic: Sequence[Any]) -> dict[str, float]:
        lr = set_learning_rate([self.critic_optimizer], self.step, self.loop.steps, critic.optim)
        _zero_grad([self.critic_optimizer])
        with autocast(self.loop):
            loss = self.critic_objective(for_critic)
        loss.value.backward()
        norm = nn.utils.clip_grad_norm_(critic.module.parameters(), critic.optim.grad_clip or math.inf)
        metrics = _mean_over_batch([{**loss.metrics, "critic_grad_norm": norm}], {})
        if math.isfinite(metrics["critic_grad_norm"]):
            self.critic_optimizer.step()
        return {**metrics, "critic_lr": lr}

    def show(self) -> None:
        """Write the sample grid and log the validation metrics; the best of these marks its state to be kept."""
        with use_backend(PLAIN):
            self._show()

    def _show(self) -> None:
        if is_rank0() and self.preview is not None:
            columns = self.recipe.preview(self.ema.model, self.preview)
            save_image(preview_grid([self.preview, *columns]), self.out / "samples" / f"{self.step:06d}.png")
        if self.validation is None:
            return
        try:
            metrics = self.validation.measure(self.ema.model)
        except InputError as e:  # in all processes: a file that was readable at the start
            if is_rank0():
                log.warning("no validation at step %d: %s", self.step, e)
            return
        self.log.write(self.step, {f"val/{name}": value for name, value in metrics.items()})
        if math.isnan(metrics["psnr_db"]):
            return
        self.improved = self.best is None or metrics["psnr_db"] > self.best["psnr_db"]
        if self.improved:
            self.best = {"step": self.step, **metrics}

    def save_state(self) -> None:
        """Write everything needed to continue, by all processes. Raises CheckpointError if it cannot be written."""
        tensors = {f"tokenizer.{n}": t for n, t in self.tokenizer.state_dict().items()}
        tensors |= {f"ema.{n}": t for n, t in self.ema.model.state_dict().items()}
        if self.critic is not None:
            tensors |= {f"critic.{n}": t for n, t in self.critic.module.state_dict().items()}
        for name, optimizer in self._named_optimizers().items():
            for index, state in optimizer.state_dict()["state"].items():
                tensors |= {f"{name}.{index}.{key}": value for key, value in state.items()}
        metadata = {
            "step": self.step,
            **self._identity(),
            "guard": self.guard.state(),
            "unreadable": self.unreadable,
            "best": self.best,
            "data": self.dataset.fingerprint(),
            "provenance": self.provenance,
        }
        self.store.save(self.step, tensors, metadata, None if self.best is None else self.best["step"])
        self.improved = False

    def load_state(self) -> None:
        """Continue from the newest state in ``out``, if there is one."""
        if (self.out / "state.pt").exists():
            raise_on_rank0(
                CheckpointError(
                    f"cannot resume from {self.out / 'state.pt'}: an earlier version wrote it, with other random "
                    "numbers; choose another out folder"
                )
            )
        found = self.store.load(self._identity(), metadata_fault)
        if found is not None:
            try:
                self._restore(*found)
            except (RuntimeError, KeyError, ValueError, TypeError) as e:
                reason = str(e).strip().splitlines()[0]
                raise_on_rank0(
                    CheckpointError(
                        f"cannot resume from {self.store.path(self.step)}: its tensors are not this run's: {reason}"
                    )
                )
            data, mine = found[1].get("data"), self.dataset.fingerprint()
            if data is not None and data != mine and is_rank0():
                count = data.get("images") if isinstance(data, dict) else data
                log.warning(
                    "the images are not those of %s (%s images there, %s now): the run goes on, with the new ones",
                    self.store.path(self.step), count, mine["images"],
                )  # fmt: skip
        self.log.cut(self.step)

    def _restore(self, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
        self.step = metadata["step"]
        self.guard.load(metadata["guard"])
        self.unreadable, self.best = metadata["unreadable"], metadata["best"]

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


def metadata_fault(metadata: dict[str, Any]) -> str | None:
    """What is wrong with the types in a state's metadata, or None."""
    guard, best = metadata.get("guard"), metadata.get("best")
    if not is_count(metadata.get("step")) or not is_count(metadata.get("unreadable")):
        return "step and unreadable must be integers of at least 0"
    if not isinstance(guard, dict) or not Guard.is_state(guard):
        return "guard must hold counts and means"
    if best is not None and not (
        isinstance(best, dict) and is_count(best.get("step")) and is_number(best.get("psnr_db"))
    ):
        return "best must be null or hold step and psnr_db"
    return None


def _zero_grad(optimizers: Iterable[torch.optim.Optimizer]) -> None:
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)


def _synchronised(objective: nn.Module, last: bool) -> AbstractContextManager[Any]:
    """Average gradients over the processes only in the last micro-batch of a step."""
    if last or not isinstance(objective, DistributedDataParallel):
        return nullcontext()
    return objective.no_sync()


def _mean_over_batch(metrics: Sequence[dict[str, Tensor]], sums: dict[str, float]) -> dict[str, float]:
    """Means of the metrics' elements over micro-batches and processes, and the numbers in ``sums`` summed.

    Synchronises with the device once and reduces once, on the CPU. A metric without elements anywhere is left out.
    """
    names = sorted({name for part in metrics for name in part})
    totals = [torch.stack([p[n].double().sum() for p in metrics if n in p]).sum() for n in names]
    counts = [sum(p[n].numel() for p in metrics if n in p) for n in names]
    packed = torch.tensor([*torch.stack(totals).tolist(), *counts, *sums.values()], dtype=torch.float64)
    packed = sum_over_processes(packed)
    total, count, rest = packed.split([len(names), len(names), len(sums)])
    means = {n: float(t / c) for n, t, c in zip(names, total, count, strict=True) if c}
    return {**means, **dict(zip(sums, rest.tolist(), strict=True))}
