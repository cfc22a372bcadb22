"""Configurations that every family shares."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

from msdd_fast.diffusion.from_dict import from_dict
from msdd_fast.errors import ConfigError

if TYPE_CHECKING:
    from typing_extensions import Self

FloatName = Literal["float32", "bfloat16"]
TimeGrid = Literal["uniform", "authors", "power"]


class Config(Protocol):
    """What the config of every family has. It is frozen, and everything but the weights follows from it."""

    @property
    def family(self) -> str:
        """Name of the family in the registry."""
        ...

    @property
    def image_size(self) -> int:
        """Pixels per side of the square images that the command line and training take."""
        ...

    @property
    def schedule(self) -> ScheduleConfig: ...

    @property
    def sampling(self) -> SamplingConfig: ...

    @property
    def latent_shape(self) -> tuple[int | None, ...]:
        """Shape of one image's latents; None for a side that is free."""
        ...

    @property
    def has_null_context(self) -> bool:
        """Whether the decoder knows a context for "no latents", which classifier-free guidance needs."""
        ...

    def stage_shapes(self, latents: Sequence[int]) -> list[tuple[int, int, int]]:
        """Shape (3, H, W) of the state in every stage, for latents of a shape (B, ...)."""
        ...

    def to_dict(self) -> dict[str, Any]: ...

    def to_json(self) -> str: ...


class JsonConfig:
    """``to_dict``, ``to_json`` and ``from_dict`` of a frozen dataclass."""

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(cast(Any, self))

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_dict(cls, data: Any) -> Self:
        """Inverse of ``to_dict``. Raises ConfigError for unknown fields and wrong types."""
        config: Self = from_dict(cls, data, "config")
        return config


@dataclass(frozen=True)
class ScheduleConfig:
    """Multi-scale noise schedule (docs/spec.md#schedule)."""

    num_stages: int = 4
    block_correlation: float = -1.0 / 3.0
    """Correlation of the renoising inside a 2x2 block: -1/3 keeps the state white, +1/3 is the
    authors' code, 0 is the paper's Eq. 3."""
    timestep_dtype: FloatName = "float32"
    """dtype in which model times T/1000 are rounded; "bfloat16" is parity with bf16 checkpoints."""
    time_grid: TimeGrid = "uniform"
    """Step times inside a stage (docs/spec.md#time-grids): "uniform" in [1, 0]; "authors" ends with a step of 0.001;
    "power" is the uniform grid raised to ``time_power``, with the time itself as the model time: for one stage."""
    time_power: float = 2.0
    """Exponent of the grid "power"; the others have none."""

    def __post_init__(self) -> None:
        require(
            self.time_grid != "power" or self.num_stages == 1,
            f"schedule.time_grid 'power' is for one stage, got num_stages={self.num_stages}",
        )
        require(0 < self.time_power <= 100, f"schedule.time_power must be in (0, 100], got {self.time_power}")


@dataclass(frozen=True)
class SamplingConfig:
    """What ``Tokenizer.decode`` does unless told otherwise: a property of the weights."""

    steps: int = 1
    cfg_scale: float = 1.0

    def __post_init__(self) -> None:
        require_int("sampling.steps", self.steps, MAX_STEPS)
        require_float("sampling.cfg_scale", self.cfg_scale, 0, MAX_FLOAT)


# Far above any model that makes sense, and far below what overflows, or takes hours to refuse.
MAX_SIZE = 2**16
MAX_DEPTH = 1024
MAX_STEPS = 10**5
MAX_FLOAT = 1e9
MAX_PARAMETERS = 10**11


def require(ok: bool, message: str) -> None:
    if not ok:
        raise ConfigError(message)


def require_int(name: str, value: Any, most: int, least: int = 1) -> None:
    """Raise ConfigError unless ``value`` is an integer from ``least`` to ``most``."""
    ok = isinstance(value, int) and not isinstance(value, bool)
    require(ok, f"{name} must be an integer, got {value!r:.40}")
    require(value >= least, f"{name} must be at least {least}, got {_short(value)}")
    require(value <= most, f"{name} must be at most {most}, got {_short(value)}")


def require_float(name: str, value: Any, least: float = -MAX_FLOAT, most: float = MAX_FLOAT) -> None:
    """Raise ConfigError unless ``value`` is a number from ``least`` to ``most``; NaN is none."""
    ok = isinstance(value, (int, float)) and not isinstance(value, bool)
    require(ok, f"{name} must be a number, got {value!r:.40}")
    if value < least and most == MAX_FLOAT:
        raise ConfigError(f"{name} must be >= {least:g}, got {_short(value)}")
    require(least <= value <= most, f"{name} must be in [{least:g}, {most:g}], got {_short(value)}")


def require_correlation(schedule: ScheduleConfig) -> None:
    """Raise ConfigError for a correlation that no 2x2 noise has."""
    rho = schedule.block_correlation
    require(
        -1.0 / 3.0 - 1e-6 <= rho < 1.0,
        f"schedule.block_correlation must be in [-1/3, 1), got {rho}: no 2x2 noise has it",
    )


def num_parameters(config: Config) -> int:
    """Elements of all weights, counted by the config's own ``num_parameters`` before any module is built.

    0 for a family that does not count: its sizes are then compared with the files' when the model has been built.
    """
    return int(getattr(config, "num_parameters", 0))


def require_parameters(config: Config) -> None:
    """Raise ConfigError for a config of more weights than any memory holds."""
    count = num_parameters(config)
    require(count <= MAX_PARAMETERS, f"the sizes must give at most {MAX_PARAMETERS:.0e} parameters, got {count:.1e}")


def _short(value: float) -> str:
    if isinstance(value, int) and abs(value) >= 10**18:
        return f"{value.bit_length()} bits"
    return str(value)
