"""Configuration of an MSDD tokenizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from msdd_fast.diffusion.config import (
    MAX_DEPTH,
    MAX_SIZE,
    FloatName,
    JsonConfig,
    SamplingConfig,
    ScheduleConfig,
    require,
    require_correlation,
    require_float,
    require_int,
    require_parameters,
)

Conditioning = Literal["cross", "joint"]
ImageRope = Literal["rotary", "cosine"]
ImagePositions = Literal["scaled", "centered"]
ContextPositions = Literal["grid", "row"]
VelocityInit = Literal["passthrough", "zero"]
Prediction = Literal["velocity", "image"]


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding of image tokens and latent tokens (docs/spec.md#rope)."""

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
    """Image to latent tokens: a ViT in which learned registers read the image (docs/spec.md#encoder)."""

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
    """Noisy image, time and latent tokens to velocity (docs/spec.md#cross-block, docs/spec.md#joint-block)."""

    depth: int = 12
    hidden_size: int = 768
    head_dim: int = 64
    mlp_multiple_of: int = 256
    conditioning: Conditioning = "cross"
    gate_init: float = 1.0
    """Residual gates at initialisation (bias of the adaLN linear); 0 is adaLN-Zero."""
    velocity_init: VelocityInit = "passthrough"
    """The network's output at initialisation: roughly x_t itself, whose noise a good velocity must carry, or zero."""
    prediction: Prediction = "velocity"
    """What the network's output is. "image" is the noise-free one, from which the velocity follows. A velocity carries
    the noise of every pixel, for which a patch must not have more values than ``hidden_size``
    (docs/spec.md#image-prediction)."""


@dataclass(frozen=True)
class TokenizerConfig(JsonConfig):
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
            require_int(name, getattr(self, name), MAX_SIZE)
        for name, part in (("encoder", self.encoder), ("decoder", self.decoder)):
            require_int(f"{name}.depth", part.depth, MAX_DEPTH)
            for size in ("hidden_size", "head_dim", "mlp_multiple_of"):
                require_int(f"{name}.{size}", getattr(part, size), MAX_SIZE)
            require(
                part.head_dim % 4 == 0,
                f"{name}: hidden_size must be positive and head_dim a multiple of 4 (two rotary axes), "
                f"got {part.hidden_size} and {part.head_dim}",
            )
            require(
                part.hidden_size % part.head_dim == 0,
                f"{name}.hidden_size must be a multiple of head_dim={part.head_dim}, got {part.hidden_size}",
            )
        require_float("encoder.register_std", self.encoder.register_std, 0)
        require_float("decoder.gate_init", self.decoder.gate_init)
        require_float("rope.base", self.rope.base, 1e-9)
        require_float("rope.position_prior", self.rope.position_prior)
        stages = self.schedule.num_stages
        require(1 <= stages <= 10, f"schedule.num_stages must be 1 to 10, got {stages}")
        require_correlation(self.schedule)
        coarsest = self.patch_size * 2 ** (stages - 1)
        require(
            self.image_size % coarsest == 0,
            f"image_size must be a multiple of patch_size * 2^(num_stages-1) = {coarsest} so that every stage "
            f"has a whole patch grid, got {self.image_size}",
        )
        start = self.image_size // 2 ** (stages - 1)
        require(
            start % 2 == 0, f"the first stage must have an even resolution (noise comes in 2x2 blocks), got {start}"
        )
        require_parameters(self)

    @property
    def family(self) -> str:
        return "msdd"

    @property
    def num_parameters(self) -> int:
        enc, dec, n, dim = self.encoder, self.decoder, self.num_latent_tokens, self.latent_dim
        width, patch = enc.hidden_size, 3 * self.patch_size**2
        encoder = width * (patch + 1) + n * width + dim * (width + 1)
        encoder += (2 * enc.depth - 1) * _stream(enc, adaln=False) + _stream(enc, adaln=False, kv_only=True)
        width = dec.hidden_size
        decoder = width * (patch + 1) + _linear(256, width) + _linear(width, width) + _linear(dim, width) + n * dim
        decoder += _linear(width, 2 * width) + _linear(width, patch) + dec.depth * _stream(dec, adaln=True)
        if dec.conditioning == "joint":
            decoder += (dec.depth - 1) * _stream(dec, adaln=True) + _stream(dec, adaln=True, kv_only=True)
        else:
            decoder += 2 * width + dec.depth * (_linear(width, 2 * width) + 2 * dec.head_dim)
        return encoder + decoder

    @property
    def has_null_context(self) -> bool:
        return True

    @property
    def latent_shape(self) -> tuple[int, int]:
        """Shape of an image's latents: (num_latent_tokens, latent_dim)."""
        return self.num_latent_tokens, self.latent_dim

    @property
    def grid_size(self) -> int:
        """Patches per side at full resolution: M in docs/spec.md."""
        return self.image_size // self.patch_size

    def stage_resolution(self, stage: int) -> int:
        """Pixels per side of a stage; the last stage is ``image_size``."""
        return self.image_size // 2 ** (self.schedule.num_stages - 1 - stage)

    def stage_shapes(self, latents: Sequence[int]) -> list[tuple[int, int, int]]:
        """Shape (3, H, W) of the state in every stage, for latents of a shape (B, ...)."""
        return [(3, r, r) for r in map(self.stage_resolution, range(self.schedule.num_stages))]


def swiglu_hidden_size(hidden_size: int, multiple_of: int) -> int:
    """int(2/3 * 4 * D) rounded up to a multiple (docs/spec.md#swiglu)."""
    raw = int(2 * 4 * hidden_size / 3)
    return -(-raw // multiple_of) * multiple_of


def _linear(inputs: int, outputs: int) -> int:
    return (inputs + 1) * outputs


def _stream(part: EncoderConfig | DecoderConfig, *, adaln: bool, kv_only: bool = False) -> int:
    """Parameters of a ``mmdit.Stream``."""
    width, norms = part.hidden_size, 1 if kv_only else 2
    inner = swiglu_hidden_size(width, part.mlp_multiple_of)
    modulation = _linear(width, (2 if kv_only else 6) * width) if adaln else norms * 2 * width
    rest = _linear(width, 2 * width) if kv_only else _linear(width, 4 * width) + 3 * width * inner
    return modulation + rest + norms * 2 * part.head_dim


def authors_choices(config: TokenizerConfig) -> TokenizerConfig:
    """The same sizes with every disputed choice as in the authors' code (docs/spec.md#authors-checkpoint)."""
    return dataclasses.replace(
        config,
        encoder=dataclasses.replace(config.encoder, register_std=1.0, latent_norm=False),
        decoder=dataclasses.replace(config.decoder, conditioning="joint"),
        rope=RopeConfig(image_rope="cosine", image_positions="centered", context_positions="row"),
        schedule=dataclasses.replace(config.schedule, block_correlation=1.0 / 3.0, time_grid="authors"),
    )
