"""What both training programs share: their data, their folder, their configuration files."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from msdd_fast.errors import ConfigError, InputError
from msdd_fast.io.images import center_crop, find_image_files, load_image, to_tensor
from msdd_fast.metrics.vgg19 import Vgg19Distance
from msdd_fast.training.data.dataset import CropConfig, ImageDataset, find_images
from msdd_fast.training.loop.distributed import broadcast_object, is_first, world_size
from msdd_fast.training.loop.trainer import LoopConfig, OptimConfig
from msdd_fast.training.loop.validation import Validation
from msdd_fast.training.losses.perceptual import PerceptualName

CONFIGS = Path(__file__).parent / "configs"
C = TypeVar("C", bound="RunConfig")


@dataclass(frozen=True)
class RunConfig:
    """What both stages are told."""

    data: tuple[str, ...]
    """Image folders, .tar shards (train-{000..146}.tar names many), or "pipe:COMMAND" that writes a shard."""
    out: str
    """Folder of the run; an interrupted run in it is continued."""
    cache: str | None = None
    """Folder where the shards of pipes are kept."""
    crop: Literal["random", "adm", "center"] = "random"
    """How a square is cut out, see data.CropConfig; "adm" is the authors' way."""
    min_crop: float = 0.8
    """Random square crops take this much to all of the shorter side."""
    resize: Literal["bicubic", "bilinear", "lanczos", "box"] = "bicubic"
    """Filter of the resize, antialiased."""
    flip: bool = True
    preview: str | None = None
    """Folder or picture for the sample grids (default: the first training images)."""
    val: str | None = None
    """Folder of held-out pictures, measured every sample_every steps."""
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


def make_dataset(config: RunConfig, size: int) -> ImageDataset:
    """The training data; the first process lists it for all."""
    crop = CropConfig(config.crop, config.min_crop, config.resize, config.flip)
    refs = broadcast_object(lambda: find_images(config.data, config.cache))
    return ImageDataset(refs, size, config.loop.seed, crop)


def make_validation(config: RunConfig, size: int) -> Validation | None:
    """The held-out pictures, if there are any."""
    if config.val is None:
        return None
    distance = Vgg19Distance(config.vgg19).to(config.loop.device) if config.vgg19 else None
    return Validation(find_image_files(config.val), size, config.loop.device, distance)


def preview_images(source: str | None, dataset: ImageDataset, size: int) -> Tensor:
    """Up to eight pictures of a folder, or the first four of the training data: (B, 3, size, size)."""
    if source is None:
        return torch.stack([dataset[i] for i in range(min(4, len(dataset)))])
    return torch.stack([to_tensor(center_crop(load_image(f), size)) for f in find_image_files(source)[:8]])


def make_folder(config: RunConfig) -> None:
    """The folder of the run with its config.json, by the first process. Raises InputError if it cannot be written."""
    if not is_first():
        return
    out, content = Path(config.out), dataclasses.asdict(config)
    if world_size() > 1:
        content["loop"]["device"] = config.loop.device.split(":")[0]  # every process has its own
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "config.json").write_text(json.dumps(content, indent=2) + "\n")
    except OSError as e:
        raise InputError(f"out must be a writable folder, got {out}: {e}") from e


def config_names() -> list[str]:
    """Names of the configurations that come with the package."""
    return sorted(p.stem for p in CONFIGS.glob("*.json"))


def read_config(kind: type[C], name_or_path: str, missing: Any = None) -> C:
    """A configuration from a file such as a run's config.json, or from one that comes with the package, by name.

    Fields that the file lacks have their defaults; ``data`` and ``out``, which have none, become ``missing``. Raises
    ConfigError for unknown fields and wrong types, and where there is no such file.
    """
    path = CONFIGS / f"{name_or_path}.json" if name_or_path in config_names() else Path(name_or_path)
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
        config: C = _build(kind, data, name_or_path, {name: missing for name in required})
        return config
    raise ConfigError(f"{path} must hold a mapping, got {type(data).__name__}")


def _has_no_default(f: dataclasses.Field[Any]) -> bool:
    return f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING


def _build(kind: Any, data: Any, where: str, extra: dict[str, Any]) -> Any:
    if not isinstance(data, dict):
        raise ConfigError(f"{where} must be a mapping, got {data!r}")
    hints = typing.get_type_hints(kind)
    unknown = sorted(set(data) - set(hints))
    if unknown:
        raise ConfigError(f"{where} has unknown field {unknown[0]!r}; known: {', '.join(sorted(hints))}")
    return kind(**extra, **{name: _coerce(hints[name], value, f"{where}: {name}") for name, value in data.items()})


def _coerce(kind: Any, value: Any, where: str) -> Any:
    """``value``, which came out of JSON, as the annotation ``kind`` has it."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _build(kind, value, where, {})
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _coerce(next(a for a in args if a is not type(None)), value, where)
    if origin is Literal:
        if value in args:
            return value
        raise ConfigError(f"{where} must be one of {', '.join(map(str, args))}, got {value!r}")
    if origin is tuple and isinstance(value, list):
        kinds = [args[0]] * len(value) if args[-1] is Ellipsis else list(args)
        if len(kinds) == len(value):
            return tuple(_coerce(k, v, where) for k, v in zip(kinds, value, strict=True))
    elif kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    elif isinstance(kind, type) and isinstance(value, kind) and (kind is bool) == isinstance(value, bool):
        return value
    raise ConfigError(f"{where} must be {getattr(kind, '__name__', kind)}, got {value!r}")
