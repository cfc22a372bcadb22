"""The multi-scale noise schedule (docs/spec.md#schedule).

Three different numbers, never mixed:

* the *level* of a state, ``start_t`` and ``end_t``: 1 is pure noise, 0 the image;
* the *within-stage time* t, which runs from 1 to 0 in every stage;
* the *model time* T/1000 in (0, 1], which the network's time embedding sees.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from msdd_fast.diffusion.config import ScheduleConfig
from msdd_fast.errors import InputError

NUM_TIMESTEPS = 1000
# gamma of the paper's renoising; alpha and beta keep it whatever block_correlation is (docs/spec.md#schedule).
GAMMA = 1.0 / 3.0
# Level below which ``Stage.velocity_gain`` stops growing.
LOWEST_LEVEL = 0.02


@dataclass(frozen=True)
class Stage:
    """One scale. ``alpha`` and ``beta`` renoise the upsampled previous state: alpha * up(x) + beta * n."""

    index: int
    start_t: float
    end_t: float
    timestep_max: float
    timestep_min: float
    alpha: float
    beta: float

    @property
    def timestep_last(self) -> float:
        """Last entry of the authors' table of 1000 timesteps."""
        return self.timestep_max + (1 - 1 / NUM_TIMESTEPS) * (self.timestep_min - self.timestep_max)

    def velocity_gain(self, t: Tensor) -> Tensor:
        """Factor that makes x_t minus the predicted image the velocity, at within-stage times t
        (docs/spec.md#image-prediction)."""
        span = self.start_t - self.end_t
        return span / (self.end_t + span * t).clamp_min(LOWEST_LEVEL)

    def within_stage_time(self, model_time: Tensor) -> Tensor:
        """The within-stage time t of a model time."""
        span = self.timestep_max - self.timestep_min
        return (model_time.double() * NUM_TIMESTEPS - self.timestep_min).div(span).to(model_time.dtype)


# One stage from noise to image, whose model time is the time itself (docs/spec.md#ssdd-schedule).
CONTINUOUS = Stage(0, start_t=1.0, end_t=0.0, timestep_max=1000.0, timestep_min=0.0, alpha=1.0, beta=0.0)


class StageSchedule:
    """The stages of a decode, coarse to fine, and the times of their Euler steps."""

    stages: tuple[Stage, ...]

    def __init__(self, config: ScheduleConfig) -> None:
        self.config = config
        self.stages = (CONTINUOUS,) if config.time_grid == "power" else build_stages(config.num_stages)

    def __len__(self) -> int:
        return len(self.stages)

    def __getitem__(self, index: int) -> Stage:
        return self.stages[index]

    def round_model_time(self, timesteps: Tensor) -> Tensor:
        """Timesteps (0..1000) to float32 model times, rounded as ``timestep_dtype`` asks (docs/spec.md#time-grids)."""
        dtype = getattr(torch, self.config.timestep_dtype)
        return (timesteps.to(dtype) / NUM_TIMESTEPS).float()

    def time_grid(self, stage: int, steps: int) -> tuple[Tensor, Tensor]:
        """Model times (steps,) and within-stage times (steps + 1,) of ``steps`` Euler steps, float32 on the CPU.

        "uniform" divides [1, 0] evenly. "authors" is linspace(1, 0.001, steps) and then 0, whose last
        evaluation moves the state by a thousandth only. "power" is the uniform grid to the ``time_power``.
        One step is the same in all.
        """
        if steps < 1:
            raise InputError(f"steps must be at least 1, got {steps}")
        s = self.stages[stage]
        if self.config.time_grid == "authors":
            t = torch.linspace(1.0, 1.0 / NUM_TIMESTEPS, steps, dtype=torch.float64, device="cpu")
            timesteps = torch.linspace(s.timestep_max, s.timestep_last, steps, dtype=torch.float64, device="cpu")
            t = torch.cat([t, t.new_zeros(1)])
        else:
            t = 1.0 - torch.arange(steps + 1, dtype=torch.float64, device="cpu") / steps
            if self.config.time_grid == "power":
                t = t**self.config.time_power
            timesteps = s.timestep_min + t[:-1] * (s.timestep_max - s.timestep_min)
        return self.round_model_time(timesteps.float()), t.float()


def build_stages(num_stages: int) -> tuple[Stage, ...]:
    """Levels, model timesteps, alpha and beta of every stage (docs/spec.md#schedule)."""
    # e[i]: level at which stage i would start on the plain grid 1.000, 0.999, ...
    e = [1.0 - int(i * NUM_TIMESTEPS / num_stages) / NUM_TIMESTEPS for i in range(num_stages + 1)]
    alpha = [1.0] + [_alpha(e[i]) for i in range(1, num_stages)]
    start = [1.0] + [1.0 - alpha[i] * (1.0 - e[i]) for i in range(1, num_stages)]
    end = e[1:]
    # Every stage gets a share of the 1000 model timesteps in proportion to the level that it crosses.
    length = [s - t for s, t in zip(start, end, strict=True)]
    bounds = [float(NUM_TIMESTEPS)]
    for i in range(num_stages):
        fraction = math.fsum(length[: i + 1]) / math.fsum(length)
        bounds.append(float(NUM_TIMESTEPS - min(int(fraction * NUM_TIMESTEPS), NUM_TIMESTEPS - 1)))
    return tuple(
        Stage(
            index=i,
            start_t=start[i],
            end_t=end[i],
            timestep_max=bounds[i],
            timestep_min=bounds[i + 1],
            alpha=alpha[i],
            beta=0.0 if i == 0 else alpha[i] * e[i] / math.sqrt(GAMMA),
        )
        for i in range(num_stages)
    )


def _alpha(e: float) -> float:
    """Factor that maps the mean (1-e) x at the end of a stage to (1-start_t) x at the start of the next."""
    return 1.0 / (math.sqrt(1.0 + 1.0 / GAMMA) * e + 1.0 - e)
