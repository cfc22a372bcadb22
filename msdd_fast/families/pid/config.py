"""Configuration of a PiD decoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from msdd_fast.diffusion.config import (
    MAX_DEPTH,
    MAX_SIZE,
    JsonConfig,
    SamplingConfig,
    ScheduleConfig,
    require,
    require_float,
    require_int,
    require_parameters,
)
from msdd_fast.families.pid.latents import LATENTS, LatentName

TIME_WIDTH = 256
MAX_STEPS = 4

Sampler = Literal["sde", "ode", "dpm"]


@dataclass(frozen=True)
class PiDNetworkConfig:
    """Noisy image, time, caption and latent features to velocity (docs/spec.md#pid-network)."""

    hidden_size: int = 1536
    heads: int = 24
    depth: int = 14
    """Joint blocks, of image and caption tokens."""
    patch_size: int = 16
    pixel_depth: int = 2
    """Blocks that work on every pixel."""
    pixel_width: int = 16
    """Channels of a pixel."""
    attention_width: int = 1152
    attention_heads: int = 16
    """Of the attention between the pixels' patches."""
    text_width: int = 2304
    text_length: int = 300
    """Most rows of caption features."""
    rope: Literal["ntk", "original"] = "ntk"
    rope_reference: tuple[int, int] = (1024, 1024)
    """Height and width in pixels at which "ntk" leaves the frequencies as they are."""


@dataclass(frozen=True)
class LatentFeaturesConfig:
    """Latents to features of every patch, and how these enter the tokens (docs/spec.md#pid-latents)."""

    width: int = 512
    blocks: int = 4
    padding: Literal["zeros", "replicate"] = "zeros"
    unpatchify: int = 1
    """Cells per side into which each latent cell is unpacked first."""
    gate: Literal["channel", "token"] = "channel"
    """One gate for each channel of a token, or one for the token."""
    interval: int = 2
    """Joint blocks from one injection to the next."""
    pixel_injection: bool = False
    """Whether there is one more, before the pixel blocks."""


@dataclass(frozen=True)
class PiDConfig(JsonConfig):
    """A whole PiD decoder: latents (channels, h, w) -> images (3, h * factor * upscale, w * factor * upscale)."""

    image_size: int = 2048
    """Side of the square images that benchmarks and reports decode; the network takes multiples of patch_size."""
    latents: LatentName = "flux"
    """Whose latents it decodes (``latents.LATENTS``)."""
    upscale: int = 4
    """Pixels per side of the output for each pixel of the image that the latents encode."""
    decoder: PiDNetworkConfig = field(default_factory=PiDNetworkConfig)
    features: LatentFeaturesConfig = field(default_factory=LatentFeaturesConfig)
    schedule: ScheduleConfig = field(default_factory=lambda: ScheduleConfig(num_stages=1))
    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(steps=4))
    sampler: Sampler = "sde"
    """"sde" and "ode" for distilled weights, "dpm" (with guidance) for undistilled ones (docs/spec.md#pid-samplers)."""
    shift: float | None = None
    """Of the times of "dpm"; None follows the size of the image."""
    family: Literal["pid"] = "pid"

    def __post_init__(self) -> None:
        dec, lat = self.decoder, self.features
        for name in ("image_size", "upscale"):
            require_int(name, getattr(self, name), MAX_SIZE)
        for name in ("depth", "pixel_depth"):
            require_int(f"decoder.{name}", getattr(dec, name), MAX_DEPTH)
        for name in ("hidden_size", "heads", "patch_size", "pixel_width", "attention_width", "attention_heads"):
            require_int(f"decoder.{name}", getattr(dec, name), MAX_SIZE)
        for name in ("text_width", "text_length"):
            require_int(f"decoder.{name}", getattr(dec, name), MAX_SIZE)
        for i, side in enumerate(dec.rope_reference):
            require_int(f"decoder.rope_reference[{i}]", side, MAX_SIZE)
        for name in ("width", "interval", "unpatchify"):
            require_int(f"features.{name}", getattr(lat, name), MAX_SIZE)
        require_int("features.blocks", lat.blocks, MAX_DEPTH, least=0)
        for width, heads in (("hidden_size", "heads"), ("attention_width", "attention_heads")):
            w, h = getattr(dec, width), getattr(dec, heads)
            require(
                w % h == 0 and w // h % 4 == 0,
                f"decoder.{width} must be {heads}={h} times a multiple of 4 (pairs of two axes), got {w}",
            )
        require(dec.pixel_width % 4 == 0, f"decoder.pixel_width must be a multiple of 4, got {dec.pixel_width}")
        require(
            lat.width % 4 == 0, f"features.width must be a multiple of 4 (its norms have 4 groups), got {lat.width}"
        )
        require(
            self.latent_channels % lat.unpatchify**2 == 0 and self.factor % lat.unpatchify == 0,
            f"features.unpatchify must divide the latents' cells of {self.factor} pixels, and its square their "
            f"{self.latent_channels} channels, got {lat.unpatchify}",
        )
        require(
            self.scale // lat.unpatchify > dec.patch_size,
            f"a cell of the latents must cover more than one patch of {dec.patch_size} pixels, got "
            f"{self.scale // lat.unpatchify} pixels (factor {self.factor} x upscale {self.upscale} / unpatchify)",
        )
        require(
            self.scale % dec.patch_size == 0,
            f"decoder.patch_size must divide a cell's {self.scale} pixels, got {dec.patch_size}",
        )
        require(
            self.image_size % self.scale == 0,
            f"image_size must be a multiple of factor x upscale = {self.scale}, got {self.image_size}",
        )
        stages = self.schedule.num_stages
        require(stages == 1, f"schedule.num_stages must be 1 for PiD, got {stages}")
        steps, cfg = self.sampling.steps, self.sampling.cfg_scale
        distilled = self.sampler != "dpm"
        require(
            not distilled or steps <= MAX_STEPS,
            f"sampling.steps must be at most {MAX_STEPS} for the sampler {self.sampler!r}, got {steps}",
        )
        require(
            not distilled or cfg == 1.0, f"sampling.cfg_scale must be 1 for the sampler {self.sampler!r}, got {cfg}"
        )
        if self.shift is not None:
            require_float("shift", self.shift, 0.01, 1000)
        require_parameters(self)

    @property
    def latent_channels(self) -> int:
        """Channels of the latents."""
        return LATENTS[self.latents].channels

    @property
    def factor(self) -> int:
        """Pixels per side of a latent cell, in the image that the latents encode."""
        return LATENTS[self.latents].factor

    @property
    def scale(self) -> int:
        """Pixels of the output per side of a latent cell."""
        return self.factor * self.upscale

    @property
    def injections(self) -> int:
        """How often latent features enter the joint blocks."""
        return -(-self.decoder.depth // self.features.interval)

    @property
    def has_null_context(self) -> bool:
        """Undistilled weights are guided away from another caption."""
        return self.sampler == "dpm"

    @property
    def latent_shape(self) -> tuple[int, None, None]:
        """Shape of an image's latents: (latent_channels, h, w), where h and w are free."""
        return self.latent_channels, None, None

    def stage_shapes(self, latents: Sequence[int]) -> list[tuple[int, int, int]]:
        """Shape (3, H, W) of the state in the one stage, for latents of a shape (B, C, h, w)."""
        return [(3, latents[2] * self.scale, latents[3] * self.scale)]

    @property
    def num_parameters(self) -> int:
        dec, lat = self.decoder, self.features
        d, c, a, g = dec.hidden_size, dec.pixel_width, dec.attention_width, lat.width
        pixels = dec.patch_size**2
        joint = 2 * (
            2 * d + 6 * d * (d + 1) + 3 * d * d + 2 * d // dec.heads + d * (d + 1) + 3 * d * swiglu_hidden_size(d)
        )
        pixel = 6 * c * pixels * (d + 1) + (pixels * c + 1) * a + (a + 1) * pixels * c + 2 * c
        pixel += 3 * a * a + 2 * a // dec.attention_heads + (a + 1) * a + (c + 1) * 4 * c + (4 * c + 1) * c
        embed = (3 + 1) * c + (3 * pixels + 1) * d + (dec.text_width + 1) * d + d + dec.text_length * d
        time = (TIME_WIDTH + 1) * d + (d + 1) * d
        conv = 9 * g * g + g
        channels = self.latent_channels // lat.unpatchify**2
        latent = 9 * channels * g + g + conv + lat.blocks * 2 * (conv + 2 * g)
        injections = self.injections + lat.pixel_injection
        gate = (2 * d + 1) * (d if lat.gate == "channel" else 1) + 1
        last = c + (c + 1) * 3
        return (
            dec.depth * joint
            + dec.pixel_depth * pixel
            + embed
            + time
            + latent
            + injections * ((g + 1) * d + gate)
            + last
        )


def swiglu_hidden_size(width: int) -> int:
    """Hidden size of a joint block's feed-forward layer: two thirds of 4 * width, rounded down."""
    return 8 * width // 3
