"""Skips steps with a NaN, an Inf or a spike in the loss or the gradient norm; too many in a row end the run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from msdd_fast.errors import ConfigError, TrainingError
from msdd_fast.training.loop.numbers import MOST_STEPS, Range, check_numbers


@dataclass(frozen=True)
class GuardConfig:
    """Which steps are skipped."""

    spike_factor: float = 20.0
    """Skip a step whose loss or gradient norm exceeds this many times its running mean; 0: only for NaN and Inf."""
    after: int = 50
    """Accepted steps before a step can count as a spike."""
    max_in_a_row: int = 20
    """This many skipped steps in a row end the run."""

    def __post_init__(self) -> None:
        check_numbers(
            self, "guard.", spike_factor=Range(0), after=Range(1, MOST_STEPS), max_in_a_row=Range(1, MOST_STEPS)
        )
        if 0 < self.spike_factor <= 1:
            raise ConfigError(f"guard.spike_factor must be 0 or above 1, got {self.spike_factor}")


class Guard:
    """Decides from metrics that are equal in all processes, so all decide alike. Its state is part of a run's."""

    def __init__(self, config: GuardConfig) -> None:
        self.config = config
        self.accepted = self.skipped = self.in_a_row = 0
        self.means: dict[str, float] = {}

    def accepts(self, step: int, **metrics: float) -> bool:
        """Whether to take the step. Raises TrainingError when too many in a row were skipped."""
        reason = self._objection(metrics)
        if reason is None:
            self.in_a_row = 0
            self.accepted += 1
            weight = max(1 / self.accepted, 0.02)
            for name, value in metrics.items():
                mean = self.means.get(name, 0.0)
                self.means[name] = mean + weight * (abs(value) - mean)
            return True
        self.skipped += 1
        self.in_a_row += 1
        if self.in_a_row >= self.config.max_in_a_row:
            raise TrainingError(
                f"{self.in_a_row} steps in a row were skipped, the last (step {step}) because {reason}; "
                "the saved states are from before"
            )
        return False

    def _objection(self, metrics: dict[str, float]) -> str | None:
        for name, value in metrics.items():
            if not math.isfinite(value):
                return f"{name} is {value}"
        if self.config.spike_factor and self.accepted >= self.config.after:
            for name, value in metrics.items():
                if value > self.config.spike_factor * self.means[name]:
                    return f"{name} is {value:.4g} where {self.means[name]:.4g} is usual"
        return None

    def state(self) -> dict[str, Any]:
        names = ("accepted", "skipped", "in_a_row", "means")
        return {name: getattr(self, name) for name in names}

    @staticmethod
    def is_state(state: dict[str, Any]) -> bool:
        """Whether a mapping out of JSON has the form of ``state``."""
        counts = [state.get(name) for name in ("accepted", "skipped", "in_a_row")]
        means = state.get("means")
        return (
            state.keys() == {"accepted", "skipped", "in_a_row", "means"}
            and all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in counts)
            and isinstance(means, dict)
            and all(isinstance(m, (int, float)) and not isinstance(m, bool) for m in means.values())
        )

    def load(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)
