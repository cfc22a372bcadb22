"""PiD's samplers (docs/spec.md#pid-samplers): four distilled steps, and DPM-Solver++ for undistilled weights.

States are float32 (B, 3, H, W). Times are noise levels, 1 = pure noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from msdd_fast import ops
from msdd_fast.diffusion.checks import as_int
from msdd_fast.errors import InputError
from msdd_fast.families.pid.config import MAX_STEPS, PiDConfig

TIMES = (0.999, 0.866, 0.634, 0.342, 0.0)
"""What the weights were distilled for."""
SHIFT_BASE, SHIFT_SIDE = 6.0, 2048
LAST_LEVEL = 0.001

Velocity = Callable[[Tensor, Tensor], Tensor]
"""(state (B, 3, H, W), time float32 ()) -> float32 velocity."""


def distilled_times(steps: int) -> Tensor:
    """float32 (steps + 1,), from the first time to 0. One step begins at 1, others at entries of TIMES.

    Raises InputError unless ``steps`` is 1 to 4: there are no more times to take.
    """
    if not 1 <= as_int("steps", steps, 1) <= MAX_STEPS:
        raise InputError(f"steps must be 1 to {MAX_STEPS} for distilled PiD weights, got {steps}")
    if steps == 1:
        return torch.tensor([1.0, 0.0])
    last = len(TIMES) - 1
    return torch.tensor([TIMES[round(last * i / steps)] for i in range(steps + 1)])


def count_noises(config: PiDConfig, steps: int) -> int:
    """How many noise tensors a decode takes: the start, and with "sde" one for each step but the last."""
    return steps if config.sampler == "sde" else 1


def sample_distilled(
    velocity: Velocity,
    start: Tensor,
    times: Tensor,
    kind: str,
    seeds: Tensor | None = None,
    noises: Sequence[Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The image, and the state and velocity of the last step.

    For "sde" the noise of every step but the last is given in ``noises``, or that of ``seeds`` (docs/spec.md#noise).
    """
    x = start
    for i, (t, following) in enumerate(pairwise(times)):
        v = velocity(x, t)
        if following == 0:
            break
        if kind == "ode":
            x = ops.euler_step(x, v, (following - t).to(x.device))
        elif noises is None:
            x = ops.sde_step(x, v, t, following, seeds, i + 1)
        else:
            x = ops.sde_step(x, v, t, following, None, 0, noises[i])
    return ops.sde_step(x, v, t), x, v


def shift_of(config: PiDConfig, height: int, width: int) -> float:
    """By how much the times of the undistilled sampler lean to noise."""
    return SHIFT_BASE * math.sqrt(math.sqrt(height * width) / SHIFT_SIDE) if config.shift is None else config.shift


class SolverStep(NamedTuple):
    """One step of DPM-Solver++ 2M, all float32 ().

    Attributes:
        time: at which the network is asked.
        keep, first: factors of the state and, negated, of the clean image.
        ratio: of the lengths of the step before and of this one; None in a step of first order.
    """

    time: Tensor
    keep: Tensor
    first: Tensor
    ratio: Tensor | None


def solver_steps(steps: int, shift: float) -> list[SolverStep]:
    """The steps of the undistilled sampler, on the CPU, in float32 as the reference calculates them."""
    level = 1 - torch.linspace(1, LAST_LEVEL, steps + 1)
    tau = (shift * level / (1 + (shift - 1) * level)).flip(0)
    alpha = 1 - tau
    logs = alpha.log() - tau.log()
    found = []
    for i in range(steps):
        h = logs[i + 1] - logs[i]
        is_first_order = i in (0, steps - 1)
        ratio = None if is_first_order else (logs[i] - logs[i - 1]) / h
        found.append(SolverStep(tau[i], tau[i + 1] / tau[i], alpha[i + 1] * torch.expm1(-h), ratio))
    return found


def solve(step: SolverStep, x: Tensor, m: Tensor, before: Tensor | None) -> Tensor:
    """The state after a step, of the clean images m seen now and at the step before."""
    x = step.keep * x - step.first * m
    if step.ratio is None:
        return x
    assert before is not None
    return x - 0.5 * step.first * (m - before) / step.ratio


def clean_of_noise(x: Tensor, e: Tensor, t: Tensor) -> Tensor:
    """(x - t e) / (1 - t) with e the predicted noise. Loses up to 1e-3 at the first time, as the reference does."""
    return (x - t * e) / (1 - t)


def sample_undistilled(
    conditional: Velocity, null: Velocity | None, cfg_scale: float, start: Tensor, steps: int, shift: float
) -> Tensor:
    """The image. ``null`` is the velocity for the caption to be guided away from; not used with ``cfg_scale`` 1."""
    x, m = start, None
    for step in solver_steps(steps, shift):
        t = step.time
        e = (1 - t) * conditional(x, t) + x
        if cfg_scale != 1.0:
            assert null is not None
            e_null = (1 - t) * null(x, t) + x
            e = e_null + cfg_scale * (e - e_null)
        m, before = clean_of_noise(x, e, t), m
        x = solve(step, x, m, before)
    return x
