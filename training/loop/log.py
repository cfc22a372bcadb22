"""What a run writes while it trains: log.jsonl, unreadable.jsonl, TensorBoard events and a progress bar."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from tqdm import tqdm

from msdd_fast.errors import ConfigError
from msdd_fast.io.json_files import append_json_lines, keep_json_lines, read_json_lines
from msdd_fast.training.loop.distributed import is_rank0
from msdd_fast.training.loop.memory import memory_gib
from msdd_fast.training.loop.state import is_count

log = logging.getLogger(__name__)


class RunLog:
    """Logs of the run in the folder ``out``; every method may be called on all ranks.

    Args:
        out: folder of the run.
        tensorboard: write the metrics to ``out``/tensorboard, too.
    """

    def __init__(self, out: Path, tensorboard: bool = False) -> None:
        self.metrics_file, self.unreadable_file = out / "log.jsonl", out / "unreadable.jsonl"
        self._tensorboard_folder = out / "tensorboard" if tensorboard else None
        self._tensorboard: Any = None
        self._unreadable: set[str] = set()

    @contextmanager
    def opened(self) -> Iterator[None]:
        """TensorBoard is open inside the block. Raises ConfigError if it is not installed."""
        if self._tensorboard_folder is not None and is_rank0():
            self._tensorboard = tensorboard_writer(self._tensorboard_folder)
        try:
            yield
        finally:
            if self._tensorboard is not None:
                self._tensorboard.close()  # flushes its queue

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """One line of log.jsonl, on rank 0. Raises InputError if it cannot be written."""
        if not is_rank0():
            return
        append_json_lines(self.metrics_file, [{"step": step, **{k: rounded(v) for k, v in metrics.items()}}])
        if self._tensorboard is not None:
            for name, value in metrics.items():
                self._tensorboard.add_scalar(name, value, step)

    def write_unreadable(self, step: int, images: Sequence[tuple[str, str]]) -> None:
        """The images (name, reason) of this process that ``step`` skipped, in unreadable.jsonl and on stderr.

        Each image once, whichever process met it first.
        """
        if all(name in self._unreadable for name, _ in images):
            return
        self._unreadable |= {str(line.get("image")) for line in read_json_lines(self.unreadable_file)}
        new = {name: why for name, why in images if name not in self._unreadable}
        append_json_lines(self.unreadable_file, [{"step": step, "image": name, "why": w} for name, w in new.items()])
        self._unreadable |= new.keys()
        for why in new.values():
            tqdm.write(f"skipped: {why}", file=sys.stderr)

    def cut(self, step: int) -> None:
        """Drop the lines that are about to be repeated: of steps after ``step``, and ``step``'s validation; on rank 0.

        Lines that are none of ours are dropped with a warning.
        """
        if not is_rank0():
            return

        for path in (self.metrics_file, self.unreadable_file):
            without_step = 0

            def keep(line: dict[str, Any]) -> bool:
                nonlocal without_step
                there = line.get("step")
                without_step += not is_count(there)
                return is_count(there) and (there < step or (there == step and not is_validation(line)))

            foreign = keep_json_lines(path, keep) + without_step
            if foreign:
                log.warning("%s: %d lines that are not JSON or have no step were dropped", path, foreign)


def is_validation(line: dict[str, Any]) -> bool:
    """Whether a line of log.jsonl has the metrics of held-out images."""
    return any(name.startswith("val/") for name in line)


def rounded(value: float) -> float | None:
    """Six significant digits, for JSON: None, which is null, for NaN and Inf."""
    if isinstance(value, int):
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else None


class Clock:
    """Images per second since the last line of the log, and seconds since the start of this process's run."""

    def __init__(self, step: int, batch_size: int, device: str) -> None:
        self._batch_size, self._device = batch_size, device
        self._start = self._last = time.perf_counter()
        self._step = step

    def lap(self, step: int) -> dict[str, float]:
        """img_per_s, memory_gib (peak) and seconds at ``step``."""
        now = time.perf_counter()
        rate = (step - self._step) * self._batch_size / (now - self._last)
        self._last, self._step = now, step
        return {"img_per_s": rate, "memory_gib": memory_gib(self._device), "seconds": now - self._start}


def progress_bar(step: int, total: int) -> tqdm[NoReturn]:
    """Progress on rank 0's stderr if that is a terminal."""
    shown = is_rank0() and sys.stderr is not None and sys.stderr.isatty()
    return tqdm(total=total, initial=step, unit="step", dynamic_ncols=True, disable=not shown)


def progress_values(metrics: dict[str, float]) -> dict[str, str]:
    """What the progress bar shows of a step's metrics; counts of skipped steps and images only if there are any."""
    line = {
        "loss": f"{metrics['loss']:.4f}",
        "img/s": f"{metrics['img_per_s']:.1f}",
        "GiB": f"{metrics['memory_gib']:.1f}",
    }
    counts = {"skipped": metrics["skipped_steps"], "unreadable": metrics["unreadable"]}
    return {**line, **{name: f"{count:.0f}" for name, count in counts.items() if count}}


def tensorboard_writer(folder: Path) -> Any:
    """Raises ConfigError if tensorboard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as e:
        raise ConfigError("tensorboard is not installed: pip install tensorboard, or leave it off") from e
    return SummaryWriter(str(folder))
