"""Features of a frozen VGG-19 for the discriminator, instead of DINO's (docs/spec.md#adversarial)."""

from __future__ import annotations

import os

from torch import Tensor, nn

from msdd_fast.metrics.vgg19 import Vgg19Distance


class VggFeatures(nn.Module):
    """relu2_1 and relu3_1 of the network of ``metrics.vgg19``; attributes as of ``PatchFeatures``.

    Args:
        weights: as of ``Vgg19Distance``, whose errors it raises.
    """

    name = "vgg19"
    image_size = 64
    widths = (128, 256)

    def __init__(self, weights: str | os.PathLike[str]) -> None:
        super().__init__()
        self.network = Vgg19Distance(weights)

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, 64, 64) in [-1, 1] to maps (B, 128, 1024) and (B, 256, 256). Differentiable."""
        return [x.flatten(2) for x in self.network.activations(images)[1:]]
