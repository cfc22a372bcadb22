"""Configuration: frozen dataclasses, presets, and their JSON form.

A ``TokenizerConfig`` (MSDD) or an ``SSDDConfig`` is everything needed to build a tokenizer apart from its weights; it
is what ``config.json`` beside a checkpoint holds, and its ``family`` says which of the two it is. Where MSDD's paper
and its authors' code disagree, the two choices are values of one field (SPEC, table in the head; A7).
``authors_choices`` lists the values that reproduce the authors' published network.
"""

from __future__ import annotations

import dataclasses
import json
import math
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from msdd_fast.errors import ConfigError

Conditioning = Literal["cross", "joint"]
ImageRope = Literal["rotary", "cosine"]
ImagePositions = Literal["scaled", "centered"]
ContextPositions = Literal["grid", "row"]
FloatName = Literal["float32", "bfloat16"]
TimeGrid = Literal["uniform", "authors", "power"]
VelocityInit = Literal["passthrough", "zero"]


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding of image tokens and latent tokens (SPEC A0 and head)."""

    image_rope: ImageRope = "rotary"
    """"rotary" rotates q and k; "cosine" multiplies them by cos(theta), as the authors' code does."""
    image_positions: ImagePositions = "scaled"
    """"scaled": a coarse token sits at the centre of what it covers; "centered": crop of the final grid."""
    context_positions: ContextPositions = "grid"
    """"grid": latent token j at the centre of its cell of a grid over the image; "row": (row, j)."""
    context_rope_dtype: FloatName = "float32"
    """dtype of the context frequencies; "bfloat16" reproduces the authors' autocast inference."""
    base: float = 10000.0
    position_prior: float = 2.0
    """Weight of the q and k norms at initialisation, where attention is a kernel in relative position
    (models/position_prior.py). Only with "rotary" and "grid"; 0 is PyTorch's plain initialisation."""


@dataclass(frozen=True)
class EncoderConfig:
    """Image to latent tokens: a ViT in which learned registers read the image (SPEC A1)."""

    depth: int = 12
    hidden_size: int = 768
    head_dim: int = 64
    mlp_multiple_of: int = 256
    """The SwiGLU hidden size int(8/3 * hidden_size) is rounded up to a multiple of this."""
    register_std: float = 0.02
    """Standard deviation of the registers at initialisation (the authors' is 1)."""
    latent_norm: bool = True
    """Normalise every latent token to zero mean and unit variance (the authors' z is not normalised)."""


@dataclass(frozen=True)
class DecoderConfig:
    """Noisy image, time and latent tokens to velocity (SPEC A2 and head)."""

    depth: int = 12
    hidden_size: int = 768
    head_dim: int = 64
    mlp_multiple_of: int = 256
    conditioning: Conditioning = "cross"
    gate_init: float = 1.0
    """Residual gates at initialisation (bias of the adaLN linear); 0 is adaLN-Zero."""
    velocity_init: VelocityInit = "passthrough"
    """The velocity at initialisation: roughly x_t itself, whose noise a good velocity must carry, or zero."""


@dataclass(frozen=True)
class ScheduleConfig:
    """Multi-scale noise schedule (SPEC A3, A4)."""

    num_stages: int = 4
    block_correlation: float = -1.0 / 3.0
    """Correlation of the renoising inside a 2x2 block: -1/3 keeps the state white, +1/3 is the
    authors' code, 0 is the paper's Eq. 3."""
    timestep_dtype: FloatName = "float32"
    """dtype in which model times T/1000 are rounded; "bfloat16" is parity with bf16 checkpoints."""
    time_grid: TimeGrid = "uniform"
    """Step times inside a stage: "uniform" in [1, 0]; "authors" ends with a step of 0.001; "power" is the uniform
    grid raised to ``time_power``, with the time itself as the model time (SPEC-SSDD 3): for one stage."""
    time_power: float = 2.0
    """Exponent of the grid "power"; the others have none."""

    def __post_init__(self) -> None:
        _require(
            self.time_grid != "power" or self.num_stages == 1,
            f"schedule.time_grid 'power' is for one stage, got num_stages={self.num_stages}",
        )
        _require(self.time_power > 0, f"schedule.time_power must be positive, got {self.time_power}")


@dataclass(frozen=True)
class SamplingConfig:
    """What ``Tokenizer.decode`` does unless told otherwise: a property of the weights."""

    steps: int = 1
    cfg_scale: float = 1.0


@dataclass(frozen=True)
class TokenizerConfig:
    """A whole tokenizer: image of ``image_size`` squared <-> ``num_latent_tokens`` x ``latent_dim``."""

    image_size: int = 256
    patch_size: int = 8
    num_latent_tokens: int = 128
    latent_dim: int = 32
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    rope: RopeConfig = field(default_factory=RopeConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    def __post_init__(self) -> None:
        for name in ("image_size", "patch_size", "num_latent_tokens", "latent_dim"):
            _require(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")
        for name, part in (("encoder", self.encoder), ("decoder", self.decoder)):
            _require(part.depth >= 1, f"{name}.depth must be at least 1, got {part.depth}")
            _require(
                part.hidden_size >= 1 and part.head_dim >= 4 and part.head_dim % 4 == 0,
                f"{name}: hidden_size must be positive and head_dim a multiple of 4 (two rotary axes), "
                f"got {part.hidden_size} and {part.head_dim}",
            )
            _require(
                part.hidden_size % part.head_dim == 0,
                f"{name}.hidden_size must be a multiple of head_dim={part.head_dim}, got {part.hidden_size}",
            )
            _require(
                part.mlp_multiple_of >= 1, f"{name}.mlp_multiple_of must be at least 1, got {part.mlp_multiple_of}"
            )
        stages = self.schedule.num_stages
        _require(1 <= stages <= 10, f"schedule.num_stages must be 1 to 10, got {stages}")
        rho = self.schedule.block_correlation
        _require(
            -1.0 / 3.0 - 1e-6 <= rho < 1.0,
            f"schedule.block_correlation must be in [-1/3, 1), got {rho}: no 2x2 noise has it",
        )
        coarsest = self.patch_size * 2 ** (stages - 1)
        _require(
            self.image_size % coarsest == 0,
            f"image_size must be a multiple of patch_size * 2^(num_stages-1) = {coarsest} so that every stage "
            f"has a whole patch grid, got {self.image_size}",
        )
        start = self.image_size // 2 ** (stages - 1)
        _require(
            start % 2 == 0, f"the first stage must have an even resolution (noise comes in 2x2 blocks), got {start}"
        )
        _require(self.sampling.steps >= 1, f"sampling.steps must be at least 1, got {self.sampling.steps}")
        _require(self.sampling.cfg_scale >= 0, f"sampling.cfg_scale must be >= 0, got {self.sampling.cfg_scale}")

    @property
    def family(self) -> str:
        return "msdd"

    @property
    def latent_shape(self) -> tuple[int, int]:
        """Shape of an image's latents: (num_latent_tokens, latent_dim)."""
        return self.num_latent_tokens, self.latent_dim

    @property
    def grid_size(self) -> int:
        """Patches per side at full resolution (M in the SPEC)."""
        return self.image_size // self.patch_size

    def stage_resolution(self, stage: int) -> int:
        """Pixels per side of a stage; the last stage is ``image_size``."""
        return self.image_size // 2 ** (self.schedule.num_stages - 1 - stage)

    def stage_shapes(self, latents: Sequence[int]) -> list[tuple[int, int, int]]:
        """Shape (3, H, W) of the state in every stage, for latents of a shape (B, ...)."""
        return [(3, r, r) for r in map(self.stage_resolution, range(self.schedule.num_stages))]

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_dict(cls, data: Any) -> TokenizerConfig:
        """Inverse of ``to_dict``. Raises ConfigError for unknown fields and wrong types."""
        return _from_dict(cls, data, "config")


@dataclass(frozen=True)
class KLEncoderConfig:
    """Image to spatial latents: the convolutional KL encoder of latent diffusion (SPEC-SSDD 2)."""

    channels: int = 128
    """Width of the first level; the later ones have 2 and then 4 times as many channels."""


@dataclass(frozen=True)
class UViTConfig:
    """Noisy image, time and spatial latents to velocity: a U-Net with a transformer in the middle (SPEC-SSDD 1)."""

    widths: tuple[int, int, int, int] = (96, 192, 288, 288)
    """Channels at full, half, quarter and eighth resolution; the transformer has the last."""
    mid_layers: int = 12
    heads: int = 4
    window: int = 8
    """A query sees the keys less than this many rows and columns away."""
    groups: int = 32
    """Of every GroupNorm."""


@dataclass(frozen=True)
class SSDDConfig:
    """A whole SSDD tokenizer: images (3, H, W) <-> (latent_channels, H/factor, W/factor), any sides (SPEC-SSDD)."""

    image_size: int = 256
    """Side of the square crops that the command line and training take; the network takes any multiple of factor."""
    factor: int = 8
    """Pixels per side of a latent cell."""
    latent_channels: int = 4
    encoder: KLEncoderConfig = field(default_factory=KLEncoderConfig)
    decoder: UViTConfig = field(default_factory=UViTConfig)
    schedule: ScheduleConfig = field(default_factory=lambda: ScheduleConfig(num_stages=1, time_grid="power"))
    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(steps=8))
    family: Literal["ssdd"] = "ssdd"

    def __post_init__(self) -> None:
        enc, dec = self.encoder, self.decoder
        _require(
            self.factor >= 8 and self.factor & (self.factor - 1) == 0,
            f"factor must be 8 or a larger power of two (the decoder halves three times), got {self.factor}",
        )
        _require(self.latent_channels >= 1, f"latent_channels must be at least 1, got {self.latent_channels}")
        _require(
            self.image_size >= 1 and self.image_size % self.factor == 0,
            f"image_size must be a positive multiple of factor={self.factor}, got {self.image_size}",
        )
        _require(
            enc.channels >= 32 and enc.channels % 32 == 0,
            f"encoder.channels must be a positive multiple of 32 (its norms have 32 groups), got {enc.channels}",
        )
        _require(
            len(dec.widths) == 4 and all(w >= 2 and dec.groups >= 1 and w % dec.groups == 0 for w in dec.widths),
            f"decoder.widths must be 4 positive multiples of groups={dec.groups}, got {dec.widths}",
        )
        _require(
            dec.widths[0] % 2 == 0, f"decoder.widths[0] must be even (sines and cosines of time), got {dec.widths[0]}"
        )
        _require(
            dec.heads >= 1 and dec.widths[3] % dec.heads == 0,
            f"decoder.heads must divide the last width {dec.widths[3]}, got {dec.heads}",
        )
        _require(dec.mid_layers >= 1, f"decoder.mid_layers must be at least 1, got {dec.mid_layers}")
        _require(dec.window >= 1, f"decoder.window must be at least 1, got {dec.window}")
        stages = self.schedule.num_stages
        _require(stages == 1, f"schedule.num_stages must be 1 for SSDD, got {stages}")
        _require(self.sampling.steps >= 1, f"sampling.steps must be at least 1, got {self.sampling.steps}")
        cfg = self.sampling.cfg_scale
        _require(cfg == 1.0, f"sampling.cfg_scale must be 1 for SSDD (it has no null context), got {cfg}")

    @property
    def latent_shape(self) -> tuple[int, None, None]:
        """Shape of an image's latents: (latent_channels, h, w), where h and w are free."""
        return self.latent_channels, None, None

    def stage_shapes(self, latents: Sequence[int]) -> list[tuple[int, int, int]]:
        """Shape (3, H, W) of the state in the one stage, for latents of a shape (B, C, h, w)."""
        return [(3, latents[2] * self.factor, latents[3] * self.factor)]

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_dict(cls, data: Any) -> SSDDConfig:
        """Inverse of ``to_dict``. Raises ConfigError for unknown fields and wrong types."""
        return _from_dict(cls, data, "config")


AnyConfig = TokenizerConfig | SSDDConfig


def config_from_dict(data: Any) -> AnyConfig:
    """The config that ``to_dict`` of either family gave. Raises ConfigError for unknown fields and wrong types."""
    ssdd = isinstance(data, dict) and data.get("family") == "ssdd"
    return SSDDConfig.from_dict(data) if ssdd else TokenizerConfig.from_dict(data)


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise ConfigError(message)


def _from_dict(cls: Any, data: Any, where: str) -> Any:
    if not isinstance(data, dict):
        raise ConfigError(f"{where} must be a mapping, got {type(data).__name__}")
    hints = typing.get_type_hints(cls)
    unknown = sorted(set(data) - set(hints))
    if unknown:
        raise ConfigError(f"{where} has unknown field {unknown[0]!r}; known: {', '.join(sorted(hints))}")
    return cls(**{name: _coerce(hints[name], value, f"{where}.{name}") for name, value in data.items()})


def _coerce(kind: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return _from_dict(kind, value, where)
    if typing.get_origin(kind) is Literal:
        if value not in typing.get_args(kind):
            raise ConfigError(f"{where} must be one of {', '.join(typing.get_args(kind))}, got {value!r}")
        return value
    if typing.get_origin(kind) is tuple:
        kinds = typing.get_args(kind)
        if not isinstance(value, (list, tuple)) or len(value) != len(kinds):
            raise ConfigError(f"{where} must be a list of {len(kinds)} values, got {value!r}")
        return tuple(_coerce(k, v, f"{where}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True)))
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ConfigError(f"{where} must be of type {kind.__name__}, got {value!r}")
    if kind is float and not math.isfinite(value):
        raise ConfigError(f"{where} must be finite, got {value!r}")
    return value


def authors_choices(config: TokenizerConfig) -> TokenizerConfig:
    """The same sizes with every disputed choice as in the authors' code (SPEC, table in the head)."""
    return dataclasses.replace(
        config,
        encoder=dataclasses.replace(config.encoder, register_std=1.0, latent_norm=False),
        decoder=dataclasses.replace(config.decoder, conditioning="joint"),
        rope=RopeConfig(image_rope="cosine", image_positions="centered", context_positions="row"),
        schedule=dataclasses.replace(config.schedule, block_correlation=1.0 / 3.0, time_grid="authors"),
    )


def _joint(**kwargs: Any) -> TokenizerConfig:
    return TokenizerConfig(decoder=DecoderConfig(conditioning="joint"), **kwargs)


PRESETS: dict[str, TokenizerConfig] = {
    # The product: cross-attention on 128 latent tokens, 12 layers, 256 px in four stages.
    "msdd-d12": TokenizerConfig(),
    # Its counterpart to the authors' 3-stage models: patch 16.
    "msdd-d12-3scale": TokenizerConfig(patch_size=16, schedule=ScheduleConfig(num_stages=3)),
    # The paper's size and block (joint MMDiT), 4 stages, patch 8.
    "msdd-d12-joint": _joint(),
    # The authors' 3-stage models, which also use patch 16 (SPEC A7.10).
    "msdd-d12-joint-3scale": _joint(patch_size=16, schedule=ScheduleConfig(num_stages=3)),
    # The paper's baseline: one stage at full resolution.
    "msdd-d12-single-scale": _joint(schedule=ScheduleConfig(num_stages=1)),
    # Small enough to train on a CPU and to ship: at most 10 M parameters.
    "msdd-nano": TokenizerConfig(
        image_size=128,
        encoder=EncoderConfig(depth=2, hidden_size=256, mlp_multiple_of=64),
        decoder=DecoderConfig(depth=4, hidden_size=256, mlp_multiple_of=64),
        # 16 patches a side: with 10000 two thirds of the frequencies would hardly turn.
        rope=RopeConfig(base=100.0),
    ),
    # For tests.
    "tiny": TokenizerConfig(
        image_size=64,
        num_latent_tokens=16,
        encoder=EncoderConfig(depth=2, hidden_size=64, head_dim=32, mlp_multiple_of=32),
        decoder=DecoderConfig(depth=2, hidden_size=64, head_dim=32, mlp_multiple_of=32),
    ),
}


# channels at full resolution, multiples of them at each level, layers of the transformer (SPEC-SSDD 1.1).
_SSDD_SIZES = {
    "xs": (32, (1, 2, 3, 3), 8),
    "s": (48, (1, 2, 3, 3), 8),
    "b": (64, (1, 2, 3, 3), 10),
    "m": (96, (1, 2, 3, 3), 12),
    "l": (96, (1, 2, 4, 4), 16),
    "xl": (128, (1, 2, 4, 4), 16),
    "h": (192, (1, 2, 4, 4), 16),
    "xh": (256, (1, 2, 4, 4), 16),
    "g": (384, (1, 2, 4, 4), 16),
}


def _uvit(channels: int, multiples: tuple[int, ...], layers: int) -> UViTConfig:
    """Level widths are rounded up to whole groups; heads have 64 channels, but there are 4 to 16 of them."""
    full, half, quarter, eighth = (-(-channels * m // 32) * 32 for m in multiples)
    return UViTConfig((full, half, quarter, eighth), layers, heads=min(16, max(4, eighth // 64)))


SSDD_PRESETS: dict[str, SSDDConfig] = {
    # Released sizes on the two latents: "ssdd-s-f8c4" is 4 channels of a cell of 8 x 8 pixels.
    **{
        f"ssdd-{size}-f{factor}c4": SSDDConfig(factor=factor, decoder=_uvit(*numbers))
        for factor in (8, 16)
        for size, numbers in _SSDD_SIZES.items()
    },
    # For tests.
    "tiny-ssdd": SSDDConfig(
        image_size=64,
        encoder=KLEncoderConfig(channels=32),
        decoder=UViTConfig((16, 16, 24, 32), mid_layers=2, heads=2, window=4, groups=8),
        sampling=SamplingConfig(steps=2),
    ),
}


def get_preset(name: str) -> AnyConfig:
    """A preset by name. Raises ConfigError that lists the names."""
    presets: dict[str, AnyConfig] = {**PRESETS, **SSDD_PRESETS}
    if name not in presets:
        raise ConfigError(f"unknown preset {name!r}; known: {', '.join(presets)}")
    return presets[name]
