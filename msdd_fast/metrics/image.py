"""Image quality: thin wrappers round kept libraries. Images are float (B, 3, H, W) in [-1, 1].

A metric is named after the network that it really uses.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from msdd_fast.errors import InputError
from msdd_fast.metrics._checks import check_pair
from msdd_fast.metrics.vgg19 import Vgg19Distance

SSIM_DATA_RANGES: Mapping[str, float] = {"ssim": 1.0, "ssim_authors": 2.0}
"""Data range of ``ssim`` by the name of the figure: 1 is right for images in [0, 1]; 2, which inflates it, is that of
the MSDD authors' script (docs/spec.md#quantise-pixels)."""


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB per image (B,), after clamping to [-1, 1]; the peak is 2."""
    check_pair(x, y)
    mse = (x.float().clamp(-1, 1) - y.float().clamp(-1, 1)).square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(4.0 / mse.clamp_min(1e-12))


def ssim(x: Tensor, y: Tensor, variant: str = "ssim") -> Tensor:
    """Structural similarity per image (B,), scikit-image with its defaults (7x7 window), on [0, 1].

    ``variant`` is a name in SSIM_DATA_RANGES: "ssim" has data range 1, "ssim_authors" the authors' 2, which inflates
    the figure. Raises InputError for another name, for sides below 7 pixels, or if scikit-image is not installed.
    """
    check_pair(x, y)
    if variant not in SSIM_DATA_RANGES:
        raise InputError(f"variant must be one of {', '.join(SSIM_DATA_RANGES)}, got {variant!r}")
    try:
        from skimage.metrics import structural_similarity
    except ImportError as e:
        raise InputError("ssim needs scikit-image: pip install 'msdd-fast[eval]'") from e
    if min(x.shape[-2:]) < 7:
        raise InputError(f"ssim needs sides of at least 7 pixels, got {x.shape[-2]} x {x.shape[-1]}")
    a, b = ((t.float().clamp(-1, 1) + 1).div(2).permute(0, 2, 3, 1).cpu().numpy() for t in (x, y))
    data_range = SSIM_DATA_RANGES[variant]
    values = [structural_similarity(p, q, channel_axis=2, data_range=data_range) for p, q in zip(a, b, strict=True)]
    return torch.tensor(values, dtype=torch.float32)


@torch.no_grad()
def figures(x: Tensor, y: Tensor, distance: Vgg19Distance | None = None) -> dict[str, Tensor]:
    """What is measured of reconstructions ``x`` of ``y``, each (B,): psnr_db, ssim and, if given, vgg19_distance."""
    result = {"psnr_db": psnr(x, y), "ssim": ssim(x, y)}
    if distance is not None:
        result["vgg19_distance"] = distance(x.clamp(-1, 1), y)
    return result
