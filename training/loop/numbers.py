"""Checks of the numbers in configurations, when they are made."""

from __future__ import annotations

import dataclasses
import math
from numbers import Integral, Real
from typing import Any, NamedTuple

from msdd_fast.errors import ConfigError

MOST_STEPS = 10**12
MOST_IMAGES = 2**20  # in a batch: the index of a sample then fits 64 bits


class Range(NamedTuple):
    """From ``low`` to ``high``, ends included unless they are ``open``; never NaN or Inf."""

    low: float
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def has(self, value: Any) -> bool:
        above = value > self.low if self.open_low else value >= self.low
        return (
            value == value
            and abs(value) < math.inf
            and above
            and (value < self.high if self.open_high else value <= self.high)
        )

    def wanted(self, value: Any) -> str:
        """What a value outside should have been."""
        if self.high <= 1:
            return f"in {'(' if self.open_low else '['}{self.low:g}, {self.high:g}{')' if self.open_high else ']'}"
        if value <= self.low:
            return f"{'above' if self.open_low else 'at least'} {self.low:g}"
        return f"at most {self.high:g}" if self.high < math.inf else "finite"


def check_numbers(config: Any, prefix: str = "", /, **ranges: Range) -> None:
    """Raise ConfigError for a field of the dataclass ``config`` that is outside its range or of another type.

    Fields are annotated as int or float, perhaps "| None", or as tuples of one of them.
    """
    kinds = {f.name: str(f.type) for f in dataclasses.fields(config)}
    for name, allowed in ranges.items():
        value, kind = getattr(config, name), kinds[name]
        if value is None and "None" in kind:
            continue
        if "tuple" in kind:
            count = kind.count("int") + kind.count("float")
            if not isinstance(value, (tuple, list)) or len(value) != count:
                raise ConfigError(f"{prefix}{name} must be {count} numbers, got {value!r}")
        for number in value if "tuple" in kind else (value,):
            wanted: Any = Integral if "int" in kind else Real
            if isinstance(number, bool) or not isinstance(number, wanted):
                noun = "an integer" if wanted is Integral else "a number"
                raise ConfigError(f"{prefix}{name} must be {noun}, got {value!r}")
            if not allowed.has(number):
                raise ConfigError(f"{prefix}{name} must be {allowed.wanted(number)}, got {value!r}")
