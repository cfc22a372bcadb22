"""img/s of a decode, for each scale and as a whole: the table that ``msdd-fast demo`` prints."""

from __future__ import annotations

import itertools
import statistics
from typing import NamedTuple

from msdd_fast.backends import use_backend
from msdd_fast.bench.decode.models import PLAIN_PYTORCH, conditions, device_of, random_latents, resolutions_of
from msdd_fast.bench.decode.staged import StagedRun
from msdd_fast.bench.report.text import aligned
from msdd_fast.bench.timing.clock import now
from msdd_fast.diffusion.config import Config
from msdd_fast.engine import FastDecoder
from msdd_fast.tokenizer import Tokenizer


class ScaleTiming(NamedTuple):
    """Median seconds of a batch at one scale (with upsample and renoise); ``resolution`` 0 is the whole decode."""

    resolution: int
    seconds: float
    images_per_second: float


def measure_scales(
    tokenizer: Tokenizer, batch: int, steps: int | None = None, cfg_scale: float | None = None, rounds: int = 5
) -> list[ScaleTiming]:
    """Time ``rounds`` plain PyTorch decodes of random latents after a warm-up; medians of every scale and the whole.

    Backends: ``PLAIN_PYTORCH``.
    """
    z = random_latents(tokenizer.config, batch, device_of(tokenizer))
    given = conditions(tokenizer.config)
    with use_backend(PLAIN_PYTORCH):
        run = StagedRun(lambda done: tokenizer.decode(z, 0, steps, cfg_scale, stage_callback=lambda _: done(), **given))
        for _ in range(rounds + 1):
            run()
    return _timings(tokenizer.config, [[*stages, sum(stages)] for stages in run.seconds[1:]], batch)


def measure_engine_scales(engine: FastDecoder, batch: int, rounds: int = 5) -> list[ScaleTiming]:
    """The same for an engine: scales as ``stream`` delivers them, clean estimates included; the whole by ``decode``."""
    z, calls, given = random_latents(engine.config, batch, engine.device), [], conditions(engine.config)
    for _ in range(rounds + 1):
        times = [now()]
        for _ in engine.stream(z, **given):
            times.append(now())
        engine.decode(z, **given)
        times.append(now())
        calls.append([b - a for a, b in itertools.pairwise(times)])
    return _timings(engine.config, calls[1:], batch)


def _timings(config: Config, calls: list[list[float]], batch: int) -> list[ScaleTiming]:
    """``calls``: seconds of each scale and of the whole, for every call after the warm-up."""
    medians = [statistics.median(column) for column in zip(*calls, strict=True)]
    resolutions = [*resolutions_of(config), 0]
    return [ScaleTiming(r, m, batch / m) for r, m in zip(resolutions, medians, strict=True)]


def format_table(timings: list[ScaleTiming]) -> str:
    """The table as text, one line per scale and one for the whole decode."""
    rows = [["scale", "ms/batch", "img/s"]]
    for t in timings:
        name = f"{t.resolution} px" if t.resolution else "whole decode"
        rows.append([name, f"{t.seconds * 1e3:.2f}", f"{t.images_per_second:.1f}"])
    return "\n".join(aligned(rows))
