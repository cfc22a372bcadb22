"""What the papers state, for the tables. Nothing here was measured by this project."""

from __future__ import annotations

from typing import Any

_MSDD = "Wang and Chen, 2026, arXiv 2603.19570; img/s in the authors' way on their GPUs, ImageNet 256 x 256"
_SSDD = "Vallaeys et al., 2025, arXiv 2510.04961, abstract; ImageNet 256 x 256"


def _msdd(name: str, scales: int, steps: int, rate: float) -> dict[str, Any]:
    about = {"image_size": 256, "latent_shape": [128, 32], "scales": scales, "steps_per_scale": steps}
    return {"name": name, "source": _MSDD, **about, "authors": rate}


PUBLISHED: tuple[dict[str, Any], ...] = (
    _msdd("MSDD, 4 scales", 4, 1, 87.16),
    _msdd("MSDD, 3 scales", 3, 1, 118.5),
    _msdd("MSDD, 1 scale", 1, 1, 147.2),
    _msdd("MSDD, 4 scales, 120 steps", 4, 30, 2.76),
    _msdd("MSDD, 1 scale, 120 steps", 1, 120, 0.28),
    {"name": "SSDD", "source": _SSDD, "image_size": 256, "scales": 1, "steps_per_scale": 1, "mean": {"fid": 0.50}},
    {"name": "KL-VAE of SSDD's paper", "source": _SSDD, "image_size": 256, "mean": {"fid": 0.87}},
)
"""Rows with the keys of a report; ``authors`` is img/s in the authors' way. What is not known here is left out."""
