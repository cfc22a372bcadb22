"""Presets of SSDD."""

from __future__ import annotations

from msdd_fast.diffusion.config import SamplingConfig
from msdd_fast.families.ssdd.config import KLEncoderConfig, SSDDConfig, UViTConfig

# channels at full resolution, multiples of them at each level, layers of the transformer (docs/spec.md#ssdd-network).
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
