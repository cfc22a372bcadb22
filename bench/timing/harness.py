"""Compare providers of one result: correctness first, then times taken in turns.

    compare([Provider("plain", f), Provider("cpu", g)], close_to(reference, 1e-5), timer_for(device), rounds=20)

Every provider's result is checked before any is timed. Each round then times every provider once, in an order that
rotates from round to round, so that a machine that slows down slows all of them.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from msdd_fast.bench.timing.clock import Timer, now
from msdd_fast.errors import InputError

# Relative error of one rounding to nearest. A plain expression rounds after every operation, on intermediates that may
# be larger than the result, so we allow 16 roundings of the largest value. The ops' own tests allow ours a single one.
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}
ROUNDINGS = 16
FLOAT32_SLACK = 2e-6
MIN_ROUNDS = 3

Check = Callable[[str, Any], float | None]
"""(provider's name, its result) to the largest absolute error (None: not comparable). Raises WrongResultError."""


class WrongResultError(AssertionError):
    """A provider's result differs from the reference, so its time means nothing."""


@dataclass(frozen=True)
class Provider:
    """One way to compute a result; ``function`` holds its inputs.

    ``clock``: returns the seconds of one more call, for a provider that another process runs and times.
    """

    name: str
    function: Callable[[], Any]
    clock: Callable[[], float] | None = None


@dataclass(frozen=True)
class Measurement:
    """The result of one provider; ``samples`` are seconds per call, one for each round.

    ``first_s``: seconds of the first call, whose result was checked.
    """

    provider: str
    samples: tuple[float, ...]
    max_error: float | None
    first_s: float | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    def quantile(self, q: float) -> float:
        """Linear interpolation between samples, as in numpy."""
        ordered = sorted(self.samples)
        place = q * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (place - low) * (ordered[high] - ordered[low])

    def speedup(self, baseline: Measurement) -> float:
        """How many times faster than the baseline, by medians."""
        return baseline.median / self.median


def compare(
    providers: Sequence[Provider],
    check: Check,
    timer: Timer,
    rounds: int = 20,
    warmup: int = 3,
    seconds: float = float("inf"),
    min_rounds: int = MIN_ROUNDS,
) -> dict[str, Measurement]:
    """Measurements by name, in the given order.

    A provider that has ``min_rounds`` samples and has been timed for ``seconds`` in total drops out of later rounds, so
    a slow one gets few samples and does not hold up the others.

    Raises InputError for no provider, a name given twice or no round, WrongResultError before anything is timed.
    """
    names = [p.name for p in providers]
    if not names or len(set(names)) < len(names):
        raise InputError(f"providers must have one name each, got {names}")
    if rounds < 1:
        raise InputError(f"rounds must be at least 1, got {rounds}")
    errors, first_s = {}, {}
    for p in providers:
        begin = now()
        result = p.function()
        first_s[p.name] = now() - begin
        errors[p.name] = check(p.name, result)
    for p in providers:
        for _ in range(warmup):
            p.function()
    calls = {p.name: timer.calls(p.function) for p in providers if p.clock is None}
    samples: dict[str, list[float]] = {name: [] for name in names}
    spent = dict.fromkeys(names, 0.0)
    collecting = gc.isenabled()
    gc.disable()
    try:
        for r in range(rounds):
            first = r % len(providers)
            for p in (*providers[first:], *providers[:first]):
                if r >= min_rounds and spent[p.name] >= seconds:
                    continue
                begin = time.perf_counter()
                samples[p.name].append(p.clock() if p.clock else timer.seconds(p.function, calls[p.name]))
                spent[p.name] += time.perf_counter() - begin
    finally:
        if collecting:
            gc.enable()
    return {name: Measurement(name, tuple(samples[name]), errors[name], first_s[name]) for name in names}


def close_to(reference: Tensor | Sequence[Tensor], tolerance: float | None = None) -> Check:
    """A check for ``compare``: absolute error at most ``tolerance``, default ``ROUNDINGS`` of the largest value.

    A result of several tensors is compared one by one; the error is the largest.
    """
    expected = _tensors(reference)

    def check(name: str, result: Tensor | Sequence[Tensor]) -> float:
        got, worst = _tensors(result), 0.0
        if [t.shape for t in got] != [t.shape for t in expected]:
            shapes = [[tuple(t.shape) for t in ts] for ts in (expected, got)]
            raise WrongResultError(f"{name} must give tensors of the shapes {shapes[0]}, got {shapes[1]}")
        for mine, exact in zip(got, expected, strict=True):
            if not exact.numel():
                continue
            allowed = tolerance
            if allowed is None:
                allowed = ROUNDINGS * ROUNDING[mine.dtype] * float(exact.abs().max()) + FLOAT32_SLACK
            error = float((mine.float() - exact.float()).abs().max())
            if not error <= allowed:  # also for NaN
                raise WrongResultError(f"{name} is off by {error:.3g}, more than {allowed:.3g}")
            worst = max(worst, error)
        return worst

    return check


def same_moments(reference: Tensor) -> Check:
    """A check for other random numbers of the same distribution: shape, and mean and deviation to 8 standard errors."""

    def check(name: str, result: Tensor) -> None:
        if result.shape != reference.shape:
            raise WrongResultError(f"{name} must give a tensor {tuple(reference.shape)}, got {tuple(result.shape)}")
        mean, std = float(reference.float().mean()), float(reference.float().std())
        allowed = 8 * std / result.numel() ** 0.5 + FLOAT32_SLACK
        for what, got, expected in (
            ("mean", float(result.float().mean()), mean),
            ("deviation", float(result.float().std()), std),
        ):
            if not abs(got - expected) <= allowed:
                raise WrongResultError(f"{name} has the {what} {got:.5g}, expected {expected:.5g}")

    return check


def _tensors(result: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)
