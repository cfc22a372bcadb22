"""Configuration of an SSDD tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from msdd_fast.diffusion.config import JsonConfig, SamplingConfig, ScheduleConfig, require


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
        require(
            self.factor >= 8 and self.factor & (self.factor - 1) == 0,
            f"factor must be 8 or a larger power of two (the decoder halves three times), got {self.factor}",
        )
        require(self.latent_channels >= 1, f"latent_channels must be at least 1, got {self.latent_channels}")
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
        require(dec.mid_layers >= 1, f"decoder.mid_layers must be at least 1, got {dec.mid_layers}")
        require(dec.window >= 1, f"decoder.window must be at least 1, got {dec.window}")
        stages = self.schedule.num_stages
        require(stages == 1, f"schedule.num_stages must be 1 for SSDD, got {stages}")
        require(self.sampling.steps >= 1, f"sampling.steps must be at least 1, got {self.sampling.steps}")
        cfg = self.sampling.cfg_scale
        require(cfg == 1.0, f"sampling.cfg_scale must be 1 for SSDD (it has no null context), got {cfg}")

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
