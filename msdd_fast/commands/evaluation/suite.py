"""What is measured: figures of image pairs, and features for figures of whole sets."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from msdd_fast.errors import InputError
from msdd_fast.metrics.distances import require_torch_fidelity
from msdd_fast.metrics.features import FEATURE_NETWORKS, FeatureNetwork
from msdd_fast.metrics.image import psnr, ssim
from msdd_fast.metrics.lpips import Lpips
from msdd_fast.metrics.vgg19 import Vgg19Distance
from msdd_fast.ops._patches import to_uint8


class Suite:
    """Figures by name.

    Args:
        ssim_variants: names of ``metrics.image.SSIM_DATA_RANGES``.
        vgg19, lpips_vgg, lpips_alex: weights; a figure whose file is not given is not measured.
        features: weights by the names of ``metrics.features.FEATURE_NETWORKS``.
        pixels: "float" measures pairs as they are, "uint8" after the rounding that a PNG has; features are always of
            8-bit images.

    Attributes:
        pairs: figures of image pairs in [-1, 1], (B, 3, H, W) twice to (B,).
        networks: of the figures of whole sets.
        weights: network, file and SHA-256 by the name of the figure, for the report.
    """

    def __init__(
        self,
        ssim_variants: Sequence[str] = ("ssim",),
        vgg19: str | None = None,
        lpips_vgg: str | None = None,
        lpips_alex: str | None = None,
        features: Mapping[str, str] | None = None,
        pixels: str = "float",
    ) -> None:
        self.pixels = pixels
        self.device = torch.device("cpu")
        self.pairs: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"psnr_db": psnr}
        for name in ssim_variants:
            self.pairs[name] = partial(ssim, variant=name)
        # What a figure needs and is not installed is said now, not after the first batch or the last.
        for figure in self.pairs.values():
            figure(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8))
        if features:
            require_torch_fidelity()
        self.networks: list[FeatureNetwork] = []
        self.weights: dict[str, dict[str, str]] = {}
        self._modules: list[nn.Module] = []
        if vgg19:
            self._add("vgg19_distance", Vgg19Distance(vgg19), "vgg19-relu3_1", vgg19)
        for network, file in (("vgg", lpips_vgg), ("alex", lpips_alex)):
            if file:
                self._add(f"lpips_{network}", Lpips(network, file), f"lpips 0.1, {network}", file)
        for name, file in (features or {}).items():
            if name not in FEATURE_NETWORKS:
                raise InputError(f"--features must name one of {', '.join(FEATURE_NETWORKS)}, got {name!r}")
            extractor = FEATURE_NETWORKS[name](file)
            self.networks.append(extractor)
            self._modules.append(extractor)
            for title in (extractor.frechet, extractor.kid):
                self.weights[title] = _provenance(extractor.network, file)

    def _add(self, name: str, module: nn.Module, network: str, file: str) -> None:
        self._modules.append(module)
        self.pairs[name] = module
        self.weights[name] = _provenance(network, file)

    def to(self, device: torch.device) -> None:
        """Where figures are computed from now on."""
        self.device = device
        for module in self._modules:
            module.to(device)

    @torch.no_grad()
    def measure(self, results: Sequence[Tensor], references: Sequence[Tensor]) -> dict[str, Tensor]:
        """Figures and features of pairs of images (3, H, W) in [-1, 1], each of the size of its partner.

        Returns float64 (n,) by figure, and float32 (n, width) under "features.NETWORK.result" and
        "features.NETWORK.reference".
        """
        alike = len({x.shape for x in (*results, *references)}) <= 1
        groups = [range(len(results))] if alike else [range(i, i + 1) for i in range(len(results))]
        parts: dict[str, list[Tensor]] = {}
        for group in groups:
            if not group:
                continue
            x, y = (torch.stack([images[i] for i in group]).to(self.device) for images in (results, references))
            for name, value in self._measure(x, y).items():
                parts.setdefault(name, []).append(value)
        return {name: torch.cat(values) for name, values in parts.items()}

    def _measure(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        x, y = x.clamp(-1, 1), y.clamp(-1, 1)
        bytes_x, bytes_y = to_uint8(x), to_uint8(y)
        if self.pixels == "uint8":
            x, y = (b.float().div_(127.5).sub_(1) for b in (bytes_x, bytes_y))
        out = {name: figure(x, y).detach().double().cpu() for name, figure in self.pairs.items()}
        for network in self.networks:
            out[f"features.{network.network}.result"] = network(bytes_x).cpu()
            out[f"features.{network.network}.reference"] = network(bytes_y).cpu()
        return out


def parse_features(items: Sequence[str]) -> dict[str, str]:
    """NETWORK=FILE, as the command line has it. Raises InputError for anything else."""
    found: dict[str, str] = {}
    for item in items:
        name, sign, file = item.partition("=")
        if not sign or not file or name not in FEATURE_NETWORKS:
            raise InputError(
                f"--features must be NETWORK=FILE with a network of {', '.join(FEATURE_NETWORKS)}, got {item!r}"
            )
        found[name] = file
    return found


def _provenance(network: str, file: str) -> dict[str, Any]:
    digest = hashlib.sha256()
    with open(file, "rb") as f:
        while block := f.read(2**20):
            digest.update(block)
    return {"network": network, "file": Path(file).name, "sha256": digest.hexdigest()}
