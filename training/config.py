"""Configuration that all training programs share, and how configurations are read."""

from __future__ import annotations

import abc
import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, cast

from msdd_fast.diffusion.from_dict import from_dict
from msdd_fast.errors import ConfigError
from msdd_fast.tokenizer import Tokenizer
from msdd_fast.training.loop.config import LoopConfig, OptimConfig
from msdd_fast.training.loop.numbers import Range, check_numbers
from msdd_fast.training.loop.objective import Critic, Recipe
from msdd_fast.training.losses.perceptual import Perceptual, PerceptualName, make_perceptual

CONFIGS = Path(__file__).parent / "configs"
C = TypeVar("C", bound="RunConfig")


class Components(NamedTuple):
    """What one family's training program adds to the shared ones.

    Attributes:
        tokenizer: to train; parameters without ``requires_grad`` stay as they are.
        recipe: the objective.
        title: names the run in its first line.
        critic: a second network that learns in turn.
    """

    tokenizer: Tokenizer
    recipe: Recipe
    title: str
    critic: Critic | None = None


@dataclass(frozen=True)
class RunConfig(abc.ABC):
    """Configuration of a run. A training program subclasses it with its own fields and ``build``."""

    data: tuple[str, ...]
    """Image folders, .tar shards (train-{000..146}.tar names many), or "pipe:COMMAND", which writes a shard."""
    out: str
    """Folder of the run; an interrupted run in it is continued."""
    cache: str | None = None
    """Folder for the shards of pipes."""
    crop: Literal["random", "adm", "center"] = "random"
    """How a square is cut out of an image; "adm" is the authors' way."""
    min_crop: float = 0.8
    """Smallest side of a random square, as a share of the shorter side."""
    resize: Literal["bicubic", "bilinear", "lanczos", "box"] = "bicubic"
    """Filter of the resize, antialiased."""
    flip: bool = True
    """Mirror half of the images."""
    preview: str | None = None
    """Folder or image for the sample grids (default: the first training images)."""
    val: str | None = None
    """Folder of held-out images, measured every sample_every steps."""
    perceptual: PerceptualName = "vgg19"
    """Network of the perceptual loss. "random" is untrained, for tests only."""
    vgg19: str | None = None
    """vgg_normalised_conv3_1.pth, for perceptual "vgg19"."""
    vgg16: str | None = None
    """torchvision's vgg16-397923af.pth, for perceptual "lpips-vgg"."""
    lpips_heads: str | None = None
    """LPIPS v0.1's vgg.pth, for perceptual "lpips-vgg"."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)

    def __post_init__(self) -> None:
        check_numbers(self, min_crop=Range(0, 1, open_low=True))

    @abc.abstractmethod
    def build(self) -> Components:
        """Tokenizer, recipe and critic on ``loop.device``. All processes build the same weights.

        Raises ConfigError or CheckpointError; writes nothing.
        """

    def perceptual_distance(self, weight: float) -> Perceptual | None:
        """The perceptual distance on ``loop.device``, or None if its weight is 0."""
        if weight == 0:
            return None
        return make_perceptual(self.perceptual, self.vgg19, self.vgg16, self.lpips_heads).to(self.loop.device)


def replace_config(tokenizer: Tokenizer, **changes: Any) -> None:
    """Change fields of the tokenizer's config that its weights do not depend on."""
    tokenizer.config = dataclasses.replace(cast(Any, tokenizer.config), **changes)


def config_names() -> list[str]:
    """Names of the configurations in the package."""
    return sorted(p.stem for p in CONFIGS.glob("*.json"))


def config_path(name_or_path: str) -> Path:
    """File of a configuration, which is a path or the name of one in the package."""
    return CONFIGS / f"{name_or_path}.json" if name_or_path in config_names() else Path(name_or_path)


def read_config(kind: type[C], name_or_path: str, missing: Any = None) -> C:
    """A configuration from a file such as a run's config.json, or from one of the package by name.

    Fields that the file lacks take their defaults; ``data`` and ``out``, which have none, become ``missing``. Raises
    ConfigError for unknown fields and wrong types, and if there is no such file.
    """
    path = config_path(name_or_path)
    try:
        data = json.loads(path.read_text())
    except OSError as e:
        known = ", ".join(config_names())
        raise ConfigError(f"no configuration {name_or_path!r}: neither a readable file nor one of {known}") from e
    except ValueError as e:
        raise ConfigError(f"{path} is not JSON: {e}") from e
    if isinstance(data, dict):
        data.pop("about", None)
        required = {f.name for f in dataclasses.fields(kind) if _has_no_default(f)} - set(data)
        config: C = from_dict(kind, data, name_or_path, dict.fromkeys(required, missing))
        return config
    raise ConfigError(f"{path} must hold a mapping, got {type(data).__name__}")


def _has_no_default(f: dataclasses.Field[Any]) -> bool:
    return f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
