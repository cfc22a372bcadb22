"""Decodes that report the end of each scale, so that the scales can be timed one by one."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from msdd_fast.bench.timing.clock import now
from msdd_fast.engine import FastDecoder
from msdd_fast.families.base import example_conditions

StageTimer = Callable[[], None]
"""To be called after every scale of a decode."""


def untimed() -> None:
    """A stage timer for whole decodes."""


class StagedRun:
    """A call that records when each scale is done: ``seconds`` has one list, of seconds per scale, for each call."""

    def __init__(self, run: Callable[[StageTimer], Tensor]) -> None:
        self.run = run
        self.seconds: list[list[float]] = []

    def __call__(self) -> Tensor:
        times = [now()]
        out = self.run(lambda: times.append(now()))
        self.seconds.append([b - a for a, b in itertools.pairwise(times)])
        return out


def engine_stages(engine: FastDecoder, z: Tensor, stage_done: StageTimer) -> Tensor:
    """A decode of the engine that calls ``stage_done`` after every scale.

    With CUDA graphs this is ``stream``, one graph per scale, which also makes each scale's clean estimate. A single
    scale is always streamed, since that costs nothing there.
    """
    if engine.graphs or engine.config.schedule.num_stages == 1:
        images = z
        for piece in engine.stream(z, **example_conditions(engine.family)):
            images = piece.images
            stage_done()
        return images
    with torch.no_grad():
        inputs = engine.inputs(z)
        program: Any = engine.program
        stages = program.stages(inputs, engine.request(z))
        for _ in range(engine.config.schedule.num_stages - 1):
            next(stages)
            stage_done()
        images = program.final(next(stages), inputs, torch.float32)
    stage_done()
    return images
