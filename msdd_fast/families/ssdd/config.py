"""Configuration of an SSDD tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

from msdd_fast.diffusion.config import (
    MAX_DEPTH,
    MAX_SIZE,
    JsonConfig,
    SamplingConfig,
    ScheduleConfig,
    require,
    require_correlation,
    require_int,
    require_parameters,
)


@dataclass(frozen=True)
class KLEncoderConfig:
    """Image to spatial latents: the convolutional KL encoder of latent diffusion (docs/spec.md#ssdd-encoder)."""

    channels: int = 128
    """Width of the first level; the later ones have 2 and then 4 times as many channels."""


@dataclass(frozen=True)
class UViTConfig:
    """Noisy image, time and spatial latents to velocity: a U-Net with a transformer in the middle
    (docs/spec.md#ssdd-network)."""

    widths: tuple[int, int, int, int] = (96, 192, 288, 288)
    """Channels at full, half, quarter and eighth resolution; the transformer has the last."""
    mid_layers: int = 12
    heads: int = 4
    window: int = 8
    """A query sees the keys less than this many rows and columns away."""
    groups: int = 32
    """Of every GroupNorm."""


@dataclass(frozen=True)
class SSDDConfig(JsonConfig):
    """A whole SSDD tokenizer: images (3, H, W) <-> (latent_channels, H/factor, W/factor), any sides."""

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
        for name in ("image_size", "factor", "latent_channels"):
            require_int(name, getattr(self, name), MAX_SIZE)
        require_int("encoder.channels", enc.channels, MAX_SIZE)
        require_int("decoder.mid_layers", dec.mid_layers, MAX_DEPTH)
        for name in ("heads", "window", "groups"):
            require_int(f"decoder.{name}", getattr(dec, name), MAX_SIZE)
        for i, width in enumerate(dec.widths):
            require_int(f"decoder.widths[{i}]", width, MAX_SIZE)
        require(
            self.factor >= 8 and self.factor & (self.factor - 1) == 0,
            f"factor must be 8 or a larger power of two (the decoder halves three times), got {self.factor}",
        )
        require(
            self.image_size >= 1 and self.image_size % self.factor == 0,
            f"image_size must be a positive multiple of factor={self.factor}, got {self.image_size}",
        )
        require(
            enc.channels >= 32 and enc.channels % 32 == 0,
            f"encoder.channels must be a positive multiple of 32 (its norms have 32 groups), got {enc.channels}",
        )
        require(
            len(dec.widths) == 4 and all(w >= 2 and dec.groups >= 1 and w % dec.groups == 0 for w in dec.widths),
            f"decoder.widths must be 4 positive multiples of groups={dec.groups}, got {dec.widths}",
        )
        require(
            dec.widths[0] % 2 == 0, f"decoder.widths[0] must be even (sines and cosines of time), got {dec.widths[0]}"
        )
        require(
            dec.heads >= 1 and dec.widths[3] % dec.heads == 0,
            f"decoder.heads must divide the last width {dec.widths[3]}, got {dec.heads}",
        )
        require_correlation(self.schedule)
        stages = self.schedule.num_stages
        require(stages == 1, f"schedule.num_stages must be 1 for SSDD, got {stages}")
        cfg = self.sampling.cfg_scale
        require(cfg == 1.0, f"sampling.cfg_scale must be 1 for SSDD (it has no null context), got {cfg}")
        require_parameters(self)

    @property
    def num_parameters(self) -> int:
        return _encoder(self.encoder.channels, self.factor.bit_length(), self.latent_channels) + _decoder(
            self.decoder, self.latent_channels
        )

    @property
    def has_null_context(self) -> bool:
        return False

    @property
    def latent_shape(self) -> tuple[int, None, None]:
        """Shape of an image's latents: (latent_channels, h, w), where h and w are free."""
        return self.latent_channels, None, None

    def stage_shapes(self, latents: Sequence[int]) -> list[tuple[int, int, int]]:
        """Shape (3, H, W) of the state in the one stage, for latents of a shape (B, C, h, w)."""
        return [(3, latents[2] * self.factor, latents[3] * self.factor)]


def _conv(inputs: int, outputs: int, side: int = 3) -> int:
    return (inputs * side**2 + 1) * outputs


def _encoder(base: int, levels: int, latents: int) -> int:
    """Parameters of an ``encoder.KLEncoder``."""

    def block(inputs: int, outputs: int) -> int:
        shortcut = _conv(inputs, outputs, 1) if inputs != outputs else 0
        return 2 * (inputs + outputs) + _conv(inputs, outputs) + _conv(outputs, outputs) + shortcut

    widths = [base * min(4, 2**i) for i in range(levels)]
    count = _conv(3, base) + sum(_conv(w, w) for w in widths[:-1])
    count += sum(block(above, w) + block(w, w) for above, w in pairwise((base, *widths)))
    last = widths[-1]
    middle = 2 * block(last, last) + 2 * last + 4 * _conv(last, last, 1)
    return count + middle + 2 * last + _conv(last, 2 * latents) + _conv(2 * latents, 2 * latents, 1)


def _decoder(dec: UViTConfig, latents: int) -> int:
    """Parameters of a ``decoder.UViTDecoder``."""
    widths, context, last = dec.widths, dec.widths[0], dec.widths[-1]

    def block(inputs: int, outputs: int) -> int:
        shortcut = _conv(inputs, outputs, 1) if inputs != outputs else 0
        time = _conv(4 * context, 2 * outputs, 1)
        return (
            _conv(context, 2 * inputs, 1)
            + _conv(inputs, outputs)
            + time
            + 2 * outputs
            + _conv(outputs, outputs)
            + shortcut
        )

    count = _conv(3 + latents, context) + _conv(latents, context) + _conv(context, context)
    count += _conv(context, 4 * context, 1) + _conv(4 * context, 4 * context, 1)
    skips = [context]
    for i, (above, width) in enumerate(pairwise((context, *widths))):
        count += block(above, width) + block(width, width)
        skips += [width, width]
        if i < 3:
            count += _conv(width, width)
            skips.append(width)
    for i, (below, width) in enumerate(pairwise((last, *reversed(widths)))):
        count += sum(block(inputs + skips.pop(), width) for inputs in (below, width, width))
        count += _conv(width, width) if i < 3 else 0
    attention = 3 * last**2 + _conv(last, last, 1) + (2 * dec.window - 1) ** 2 * dec.heads
    layer = _conv(context, 2 * last, 1) + attention + 2 * last + _conv(last, 8 * last, 1) + _conv(4 * last, last, 1)
    middle = 2 * last + 2 * _conv(last, last, 1) + dec.mid_layers * layer
    return count + middle + 2 * context + _conv(context, 3)
