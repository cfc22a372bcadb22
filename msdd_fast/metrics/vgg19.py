"""A perceptual distance on VGG-19 features."""

from __future__ import annotations

import os

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msdd_fast.metrics._checks import check_pair, in_float32
from msdd_fast.metrics._weights import copy_weight, read_weights


class Vgg19Distance(nn.Module):
    """Perceptual distance on VGG-19 features at relu1_1, relu2_1 and relu3_1. Not LPIPS: no learned heads.

    Features are normalised to unit length over channels; the squared difference is summed over channels,
    averaged over pixels and over the three layers. Differentiable.

    Args:
        weights: ``vgg_normalised_conv3_1.pth``, the genuine VGG-19 features rescaled to mean activation 1
            (a plain Sequential's state dict; nothing is downloaded).

    Raises CheckpointError if the file is missing or is another network.
    """

    SOURCE = (
        "the VGG-19 features vgg_normalised_conv3_1.pth, https://github.com/pietrocarbo/deep-transfer/raw/master/models/"
        "autoencoder_vgg19/vgg19_3/vgg_normalised_conv3_1.pth "
        "(SHA-256 ff8506173d3a17e7b0fbfbff242c00b6827cfbcd7c21852b46806ae6a3fd7b09)"
    )
    _NETWORK = "the VGG-19 feature network up to relu3_1"
    # State-dict key -> (in, out, kernel); pools follow conv1_2 and conv2_2; taps after relu1_1, 2_1, 3_1.
    _LAYERS = ((0, 3, 3, 1), (2, 3, 64, 3), (5, 64, 64, 3), (9, 64, 128, 3), (12, 128, 128, 3), (16, 128, 256, 3))
    _TAPS = (2, 9, 16)
    _POOL_AFTER = (5, 12)

    convs: nn.ModuleDict

    def __init__(self, weights: str | os.PathLike[str]) -> None:
        super().__init__()
        state = read_weights(weights, "VGG-19 features", self.SOURCE)
        self.convs = nn.ModuleDict()
        for key, n_in, n_out, kernel in self._LAYERS:
            conv = nn.Conv2d(n_in, n_out, kernel)
            for name, parameter in conv.named_parameters():
                copy_weight(parameter, state, f"{key}.{name}", weights, self._NETWORK)
            self.convs[str(key)] = conv
        self.requires_grad_(False).eval()

    def features(self, x: Tensor) -> list[Tensor]:
        """Three feature maps with unit length over channels."""
        return [F.normalize(a, dim=1, eps=1e-6) for a in self.activations(x)]

    def activations(self, x: Tensor) -> list[Tensor]:
        """The feature maps as the network gives them: (B, 64, H, W), (B, 128, H/2, W/2), (B, 256, H/4, W/4)."""
        out = []
        x = self.convs["0"]((x.float() + 1) / 2)
        for key, *_ in self._LAYERS[1:]:
            x = F.relu(self.convs[str(key)](F.pad(x, (1, 1, 1, 1), mode="reflect")))
            if key in self._TAPS:
                out.append(x)
            if key in self._POOL_AFTER:
                x = F.max_pool2d(x, 2)
        return out

    @in_float32
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Distance per image (B,); 0 for equal images."""
        check_pair(x, y)
        pairs = zip(self.features(x), self.features(y), strict=True)
        return torch.stack([(a - b).square().sum(dim=1).mean(dim=(1, 2)) for a, b in pairs]).mean(dim=0)
