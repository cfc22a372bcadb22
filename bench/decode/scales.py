"""img/s of a decode, for each scale and as a whole: the project's headline table."""

from __future__ import annotations

import itertools
import statistics
import time
from typing import NamedTuple

import torch

from msdd_fast.backends import use_backend
from msdd_fast.diffusion.config import Config
from msdd_fast.engine import FastDecoder
from msdd_fast.families import family_of
from msdd_fast.sampling import StageResult
from msdd_fast.tokenizer import Tokenizer

# Backends of what a user of plain PyTorch has. Its attention is SDPA, since the eager reference stores all scores; the
# noise is ours, since the eager one is a slow reference of integer operations.
PLAIN_PYTORCH = (
    "eager,attention=sdpa,context_attention=sdpa,window_attention=sdpa,start_noise=auto,renoise_upsample=auto"
)


class ScaleTiming(NamedTuple):
    """Median seconds of a batch at one scale (with upsample and renoise); ``resolution`` 0 is the whole decode."""

    resolution: int
    seconds: float
    images_per_second: float


def measure_scales(
    tokenizer: Tokenizer, batch: int, steps: int | None = None, cfg_scale: float | None = None, rounds: int = 5
) -> list[ScaleTiming]:
    """Time ``rounds`` plain PyTorch decodes of random latents after a warm-up; medians for every scale and the whole.

    Backends: ``PLAIN_PYTORCH``.
    """
    cfg = tokenizer.config
    device = next(tokenizer.parameters()).device
    z = torch.randn(batch, *family_of(cfg).example, generator=torch.Generator().manual_seed(0)).to(device)
    samples: list[list[float]] = [[] for _ in range(cfg.schedule.num_stages + 1)]
    for i in range(rounds + 1):
        marks = [_now(device)]

        def mark(_: StageResult, marks: list[float] = marks) -> None:
            marks.append(_now(device))

        with use_backend(PLAIN_PYTORCH):
            tokenizer.decode(z, 0, steps, cfg_scale, stage_callback=mark)
        if i > 0:  # the first round is the warm-up
            for s in range(cfg.schedule.num_stages):
                samples[s].append(marks[s + 1] - marks[s])
            samples[-1].append(marks[-1] - marks[0])
    return _timings(cfg, samples, batch)


def measure_engine_scales(engine: FastDecoder, batch: int, rounds: int = 5) -> list[ScaleTiming]:
    """The same for an engine: scales as ``stream`` delivers them, clean estimates included; the whole by ``decode``."""
    cfg, device = engine.config, engine.device
    z = torch.randn(batch, *family_of(cfg).example, generator=torch.Generator().manual_seed(0)).to(device)
    samples: list[list[float]] = [[] for _ in range(cfg.schedule.num_stages + 1)]
    for i in range(rounds + 1):
        marks = [_now(device)]
        for _ in engine.stream(z):
            marks.append(_now(device))
        engine.decode(z)
        marks.append(_now(device))
        if i > 0:  # the first round is the warm-up
            for sample, (begin, end) in zip(samples, itertools.pairwise(marks), strict=True):
                sample.append(end - begin)
    return _timings(engine.config, samples, batch)


def _timings(cfg: Config, samples: list[list[float]], batch: int) -> list[ScaleTiming]:
    resolutions = [*resolutions_of(cfg), 0]
    medians = [statistics.median(x) for x in samples]
    return [ScaleTiming(r, m, batch / m) for r, m in zip(resolutions, medians, strict=True)]


def resolutions_of(config: Config) -> list[int]:
    """Pixels per side of the stages of a decode at ``config.image_size``."""
    return [shape[-1] for shape in config.stage_shapes((1, *family_of(config).example))]


def format_table(timings: list[ScaleTiming]) -> str:
    """The table as text, one line per scale and one for the whole decode."""
    lines = [f"{'scale':>12}  {'ms/batch':>9}  {'img/s':>8}"]
    for t in timings:
        name = f"{t.resolution} px" if t.resolution else "whole decode"
        lines.append(f"{name:>12}  {t.seconds * 1e3:9.2f}  {t.images_per_second:8.1f}")
    return "\n".join(lines)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
