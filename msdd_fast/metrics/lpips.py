"""LPIPS (Zhang et al., 2018, version 0.1) from local files: nothing is downloaded.

``Lpips`` is the authors' package ``lpips``, for evaluation. ``LpipsVgg``, for training, is the same distance with
VGG-16 in plain PyTorch and needs no package. Images are float (B, 3, H, W) in [-1, 1].
"""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msdd_fast.errors import InputError
from msdd_fast.io.packages import import_package
from msdd_fast.metrics._checks import check_pair, in_float32
from msdd_fast.metrics._weights import copy_weight, read_weights


class LpipsVgg(nn.Module):
    """Learned perceptual image patch similarity on VGG-16. Differentiable; frozen.

    Features after relu1_2, relu2_2, relu3_3, relu4_3 and relu5_3 are normalised to unit length over channels;
    their squared differences are weighted by the learned heads, averaged over pixels and summed over the layers.

    Args:
        vgg16: torchvision's ``vgg16-397923af.pth`` (ImageNet weights, the classifier in it is ignored).
        heads: ``vgg.pth`` of LPIPS v0.1, the five weightings lin0..lin4.

    Raises CheckpointError if a file is missing or holds another network.
    """

    # torchvision's names end with the first eight digits of the SHA-256.
    SOURCE = "torchvision's VGG-16, https://download.pytorch.org/models/vgg16-397923af.pth (SHA-256 397923af...)"
    HEADS = (
        "LPIPS v0.1's heads, lpips/weights/v0.1/vgg.pth of https://pypi.org/project/lpips/ "
        "(SHA-256 a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868)"
    )
    # Convolutions by index in torchvision's `features`, grouped by what lies between two taps.
    _BLOCKS = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
    _WIDTHS = (64, 128, 256, 512, 512)

    shift: Tensor
    scale: Tensor

    def __init__(self, vgg16: str | os.PathLike[str], heads: str | os.PathLike[str]) -> None:
        super().__init__()
        trunk = read_weights(vgg16, "LPIPS weights", self.SOURCE)
        linear = read_weights(heads, "LPIPS weights", self.HEADS)
        # The package's ScalingLayer: ImageNet mean and deviation for inputs in [-1, 1].
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1))
        self.convs = nn.ModuleDict()
        self.heads = nn.ParameterList()
        n_in = 3
        for i, (block, width) in enumerate(zip(self._BLOCKS, self._WIDTHS, strict=True)):
            for index in block:
                conv = nn.Conv2d(n_in, width, 3, padding=1)
                for name, parameter in conv.named_parameters():
                    copy_weight(parameter, trunk, f"features.{index}.{name}", vgg16, self.SOURCE)
                self.convs[str(index)] = conv
                n_in = width
            head = nn.Parameter(torch.zeros(1, width, 1, 1))
            copy_weight(head, linear, f"lin{i}.model.1.weight", heads, self.HEADS)
            self.heads.append(head)
        self.requires_grad_(False).eval()

    def features(self, x: Tensor) -> list[Tensor]:
        """Five feature maps with unit length over channels."""
        out = []
        x = (x.float() - self.shift) / self.scale
        for i, block in enumerate(self._BLOCKS):
            if i:
                x = F.max_pool2d(x, 2)
            for index in block:
                x = F.relu(self.convs[str(index)](x))
            # The square root has no finite gradient at zero: a little inside it, too.
            out.append(x / (x.square().sum(dim=1, keepdim=True) + 1e-20).sqrt().add(1e-10))
        return out

    @in_float32
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Distance per image (B,); 0 for equal images. Sides of at least 16 pixels."""
        check_pair(x, y)
        total = x.new_zeros(len(x), dtype=torch.float32)
        for a, b, head in zip(self.features(x), self.features(y), self.heads, strict=True):
            total = total + ((a - b).square() * head).sum(dim=1).mean(dim=(1, 2))
        return total


class Lpips(nn.Module):
    """Learned perceptual image patch similarity of images in [-1, 1], float (B, 3, H, W). Differentiable; frozen.

    The heads are those that the package bundles. Its backbone, which it would have torchvision download, is read from
    the file that you name.

    Args:
        network: "vgg" or "alex".
        backbone: torchvision's file of the network, see ``SOURCES`` (the classifier in it is ignored).

    Raises InputError if the package is not installed or ``network`` is another, CheckpointError if the file is missing
    or another network's.
    """

    SOURCES: ClassVar[dict[str, str]] = {
        "vgg": "torchvision's VGG-16, https://download.pytorch.org/models/vgg16-397923af.pth",
        "alex": "torchvision's AlexNet, https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
    }

    lpips: Any

    def __init__(self, network: str, backbone: str | os.PathLike[str]) -> None:
        super().__init__()
        if network not in self.SOURCES:
            raise InputError(f"network must be vgg or alex, got {network!r}")
        self.network = network
        state = read_weights(backbone, "LPIPS weights", self.SOURCES[network])
        package = import_package("lpips", "lpips", "eval")
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it calls torchvision in a way that is deprecated
            self.lpips = package.LPIPS(net=network, pnet_rand=True, verbose=False)
        # Slices keep the numbers of torchvision's `features`.
        for part in self.lpips.net.children():
            for name, parameter in part.named_parameters():
                copy_weight(parameter, state, f"features.{name}", backbone, self.SOURCES[network])
        self.requires_grad_(False).eval()

    @in_float32
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Distance per image (B,); 0 for equal images."""
        check_pair(x, y)
        out: Tensor = self.lpips(x.float(), y.float())
        return torch.flatten(out)
