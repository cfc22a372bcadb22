"""The latents that PiD decodes, as data: channels, size of a cell, and how a VAE's latents are normalised.

PiD reads the latents that the generator itself works with (docs/pid.md#latents): those of the VAE's encoder, shifted
and scaled. Pipelines of diffusers return them with ``output_type="latent"``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from msdd_fast.diffusion.checks import shape_of
from msdd_fast.errors import InputError

LatentName = Literal["flux", "sd3", "sdxl", "qwenimage", "flux2", "dinov2", "siglip"]
Norm = Literal["affine", "batch_norm", "layer_norm", "layer_norm_statistics"]


@dataclass(frozen=True)
class Latents:
    """One kind of latents.

    Attributes:
        channels, factor: of the normalised latents, and the pixels per side of one of their cells.
        vae: what makes them, for messages.
        mean, std: normalised = (raw - mean) / std; one number, or one for each channel.
        norm: "affine" with ``mean`` and ``std``; "batch_norm" and "layer_norm_statistics" with statistics that lie in
            the VAE's file; "layer_norm" with none.
        eps: of the norm.
        patch: cells of raw latents per side of a normalised one, whose channels are c * patch^2 + row * patch + column.
        keeps_variance: noisy latents are sqrt(1 - s^2) z + s e, of unit variance; otherwise (1 - s) z + s e.
    """

    channels: int
    factor: int
    vae: str
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    norm: Norm = "affine"
    eps: float = 0.0
    patch: int = 1
    keeps_variance: bool = False

    @property
    def raw_channels(self) -> int:
        """Channels of the VAE's latents."""
        return self.channels // self.patch**2


_QWEN_MEAN = (
    *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
    *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
)
_QWEN_STD = (
    *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
    *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
)

LATENTS: dict[LatentName, Latents] = {
    "flux": Latents(16, 8, "the VAE of FLUX.1 (also Z-Image, Boogu)", (0.1159,), (1 / 0.3611,)),
    "sd3": Latents(16, 8, "the VAE of Stable Diffusion 3", (0.0609,), (1 / 1.5305,)),
    "sdxl": Latents(4, 8, "the VAE of SDXL", (0.0,), (1 / 0.13025,), keeps_variance=True),
    "qwenimage": Latents(16, 8, "the VAE of Qwen-Image (that of Wan 2.1)", _QWEN_MEAN, _QWEN_STD),
    "flux2": Latents(128, 16, "the VAE of FLUX.2", norm="batch_norm", eps=1e-4, patch=2),
    "dinov2": Latents(768, 16, "the DINOv2 encoder of RAE", norm="layer_norm_statistics", eps=1e-5),
    "siglip": Latents(1152, 16, "the SigLIP encoder of Scale-RAE", norm="layer_norm", eps=1e-6),
}
assert set(LATENTS) == set(get_args(LatentName))


def normalise(name: LatentName, raw: Tensor, mean: Tensor | None = None, variance: Tensor | None = None) -> Tensor:
    """The latents that PiD reads of those that a VAE's encoder gives: float32 (B, channels, h, w).

    Args:
        raw: (B, raw_channels, h * patch, w * patch): the mean of the VAE's Gaussian, or the encoder's features, not
            normalised by a last LayerNorm.
        mean, variance: for "flux2" the running statistics (128,) of the VAE's BatchNorm, for "dinov2" those stored
            with RAE (768, 32, 32); not for the others.

    Raises InputError for another shape, and for statistics that are missing or not wanted.
    """
    kind = LATENTS[name]
    sides = raw.shape[2:] if isinstance(raw, Tensor) and raw.ndim == 4 else ()
    if not sides or raw.shape[1] != kind.raw_channels or any(s < 1 or s % kind.patch for s in sides):
        multiples = f", sides multiples of {kind.patch}" if kind.patch > 1 else ""
        raise InputError(f"raw must have shape (B, {kind.raw_channels}, h, w){multiples}, got {shape_of(raw)}")
    stored = kind.norm in ("batch_norm", "layer_norm_statistics")
    if stored != (mean is not None and variance is not None) or (mean is None) != (variance is None):
        wanted = "statistics (mean and variance) from the file of" if stored else "no statistics for"
        raise InputError(f"raw latents of {name!r} need {wanted} {kind.vae}")
    z = F.pixel_unshuffle(raw.float(), kind.patch)
    if kind.norm.startswith("layer_norm"):
        z = F.layer_norm(z.movedim(1, -1), (kind.channels,), eps=_layer_norm_eps(kind)).movedim(-1, 1)
    if kind.norm == "affine":
        return (z - _by_channel(kind.mean, z)) / _by_channel(kind.std, z)
    if mean is None or variance is None:
        return z
    mean, variance = (_statistics(s, t, z) for s, t in (("mean", mean), ("variance", variance)))
    return (z - mean) / (variance + kind.eps).sqrt()


def unpack(packed: Tensor, height: int, width: int) -> Tensor:
    """Latents (B, C, height, width) of a pipeline's tokens (B, height * width / p^2, C * p^2), p of 1 or 2.

    FLUX.1 and Qwen-Image have patches of 2 x 2 cells, in the order channel, row, column. FLUX.2's tokens stay packed
    (p = 1): give the sides of the packed grid.
    """
    tokens = packed.shape[1] if isinstance(packed, Tensor) and packed.ndim == 3 else 0
    patch = math.isqrt(height * width // tokens) if tokens else 0
    fits = patch in (1, 2) and tokens * patch**2 == height * width and height % patch == 0 and width % patch == 0
    if not fits or packed.shape[2] % patch**2:
        raise InputError(
            f"packed must have shape (B, {height} * {width} / p^2, C * p^2) for p of 1 or 2, got {shape_of(packed)}"
        )
    z = packed.transpose(1, 2).unflatten(2, (height // patch, width // patch))
    return F.pixel_shuffle(z, patch)


def from_euler(z: Tensor, sigma: float) -> tuple[Tensor, float]:
    """(latents, sigma) as PiD reads them, of z + sigma * noise as SDXL's Euler scheduler works with."""
    root = math.sqrt(sigma**2 + 1)
    return z / root, sigma / root


def _layer_norm_eps(kind: Latents) -> float:
    return kind.eps if kind.norm == "layer_norm" else 1e-6


def _by_channel(values: tuple[float, ...], z: Tensor) -> Tensor:
    return torch.tensor(values, dtype=z.dtype, device=z.device).view(-1, 1, 1)


def _statistics(name: str, values: Tensor, z: Tensor) -> Tensor:
    """(C,) or (C, h, w) as they apply to z (B, C, h, w)."""
    channels, sides = z.shape[1], z.shape[2:]
    if values.shape not in ((channels,), (channels, *sides)):
        raise InputError(f"{name} must have shape ({channels},) or {(channels, *sides)}, got {tuple(values.shape)}")
    values = values.to(z)
    return values.view(-1, 1, 1) if values.ndim == 1 else values
