"""Networks whose features a Frechet distance and a KID are computed from, read from local files.

Only figures on InceptionV3's last features are called FID and KID. Those of another network bear its name.
"""

from __future__ import annotations

import io
import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msdd_fast.errors import CheckpointError, InputError
from msdd_fast.io.packages import import_package
from msdd_fast.metrics._weights import copy_weight, read_weights
from msdd_fast.metrics.vgg19 import Vgg19Distance


class FeatureNetwork(nn.Module, ABC):
    """Images uint8 (B, 3, H, W) to feature vectors float32 (B, width). Frozen.

    Attributes:
        network: its name.
        width: numbers per vector.
        frechet: name of the Frechet distance on these features.
        kid: name of the kernel distance on them.
    """

    SOURCE: ClassVar[str]
    network: str
    width: int
    frechet: str
    kid: str

    def __init__(self, network: str, width: int, frechet: str, kid: str) -> None:
        super().__init__()
        self.network, self.width, self.frechet, self.kid = network, width, frechet, kid

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Raises InputError for images of another shape or dtype."""
        if images.ndim != 4 or images.shape[1] != 3 or images.dtype != torch.uint8:
            raise InputError(f"images must be uint8 (B, 3, H, W), got {tuple(images.shape)} of {images.dtype}")
        with torch.autocast(images.device.type, enabled=False):
            return self._features(images).float()

    @abstractmethod
    def _features(self, images: Tensor) -> Tensor:
        """Of checked images, without autocast."""


class InceptionFeatures(FeatureNetwork):
    """InceptionV3 as the original TensorFlow network, by torch-fidelity: the network of FID and KID.

    Images are resized to 299 pixels as TensorFlow 1 does.

    Args:
        weights: torch-fidelity's file (nothing is downloaded).
        layer: "64", "192", "768" or "2048". Figures on another layer than "2048" are not called FID.

    Raises InputError if torch-fidelity is not installed, CheckpointError if the file is missing or another network's.
    """

    SOURCE: ClassVar[str] = (
        "torch-fidelity's InceptionV3, https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
        "weights-inception-2015-12-05-6726825d.pth"
    )
    LAYERS: ClassVar[tuple[str, ...]] = ("64", "192", "768", "2048")

    extractor: nn.Module

    def __init__(self, weights: str | os.PathLike[str], layer: str = "2048") -> None:
        if layer not in self.LAYERS:
            raise InputError(f"layer must be one of {', '.join(self.LAYERS)}, got {layer!r}")
        if layer == "2048":
            names = ("inception-v3", "fid", "kid")
        else:
            names = (f"inception-v3-{layer}", f"frechet_inception_{layer}", f"kid_inception_{layer}")
        super().__init__(names[0], int(layer), names[1], names[2])
        inception = import_package("torch_fidelity.feature_extractor_inceptionv3", "torch-fidelity", "eval")
        state = read_weights(weights, "InceptionV3 weights", self.SOURCE)
        # torch-fidelity unpickles whatever the file contains: it gets a copy of what was read safely.
        safe = io.BytesIO()
        torch.save(state, safe)
        safe.seek(0)
        try:
            self.extractor = inception.FeatureExtractorInceptionV3(
                "inception-v3-compat", [layer], feature_extractor_weights_path=safe
            )
        except Exception as e:  # load_state_dict raises several kinds
            raise CheckpointError(f"{weights} is not {self.SOURCE}: {' '.join(str(e).split())[:200]}") from e

    def _features(self, images: Tensor) -> Tensor:
        out: Tensor = self.extractor(images)[0]
        return out


class Vgg19Features(FeatureNetwork):
    """VGG-19 at relu3_1, averaged over the image. Figures are called frechet_vgg19 and kid_vgg19: not FID, not KID.

    Args:
        weights: as ``Vgg19Distance`` takes them.

    Raises CheckpointError if the file is missing or another network's.
    """

    SOURCE: ClassVar[str] = Vgg19Distance.SOURCE

    vgg19: Vgg19Distance

    def __init__(self, weights: str | os.PathLike[str]) -> None:
        super().__init__("vgg19-relu3_1", 256, "frechet_vgg19", "kid_vgg19")
        self.vgg19 = Vgg19Distance(weights)

    def _features(self, images: Tensor) -> Tensor:
        return self.vgg19.activations(images.float() / 127.5 - 1)[-1].mean(dim=(2, 3))


class SqueezeNetFeatures(FeatureNetwork):
    """SqueezeNet 1.1 in front of its classifier, averaged over the image.

    Figures are called frechet_squeezenet and kid_squeezenet: not FID, not KID.

    Args:
        weights: ``squeezenet1_1_caffe_features.pth``, the Caffe model's features under torchvision's names.

    Raises CheckpointError if the file is missing or another network's.
    """

    SOURCE: ClassVar[str] = "the Caffe model's SqueezeNet 1.1 features, squeezenet1_1_caffe_features.pth"
    # Index in torchvision's `features`: channels in, squeezed, expanded (twice). 0 is a convolution; P is a pool.
    _FIRES: ClassVar[dict[int, tuple[int, int, int]]] = {
        **{3: (64, 16, 64), 4: (128, 16, 64), 6: (128, 32, 128), 7: (256, 32, 128)},
        **{9: (256, 48, 192), 10: (384, 48, 192), 11: (384, 64, 256), 12: (512, 64, 256)},
    }
    _POOL_BEFORE = (3, 6, 9)

    convs: nn.ModuleDict
    mean: Tensor

    def __init__(self, weights: str | os.PathLike[str]) -> None:
        super().__init__("squeezenet-1.1-caffe", 512, "frechet_squeezenet", "kid_squeezenet")
        state = read_weights(weights, "SqueezeNet features", self.SOURCE)
        self.convs = nn.ModuleDict()

        def add(name: str, n_in: int, n_out: int, size: int) -> None:
            stride, padding = (2, 0) if name == "0" else (1, size // 2)
            conv = nn.Conv2d(n_in, n_out, size, stride=stride, padding=padding)
            for key, parameter in conv.named_parameters():
                copy_weight(parameter, state, f"features.{name}.{key}", weights, self.SOURCE)
            self.convs[name.replace(".", "_")] = conv

        add("0", 3, 64, 3)
        for i, (n_in, squeezed, expanded) in self._FIRES.items():
            add(f"{i}.squeeze", n_in, squeezed, 1)
            add(f"{i}.expand1x1", squeezed, expanded, 1)
            add(f"{i}.expand3x3", squeezed, expanded, 3)
        # Caffe's channels are BGR.
        self.register_buffer("mean", torch.tensor([104.0, 117.0, 123.0]).view(1, 3, 1, 1))
        self.requires_grad_(False).eval()

    def _features(self, images: Tensor) -> Tensor:
        x = F.relu(self.convs["0"](images.flip(1).float() - self.mean))
        for i in self._FIRES:
            if i in self._POOL_BEFORE:
                x = F.max_pool2d(x, 3, stride=2, ceil_mode=True)
            x = F.relu(self.convs[f"{i}_squeeze"](x))
            x = torch.cat([F.relu(self.convs[f"{i}_expand1x1"](x)), F.relu(self.convs[f"{i}_expand3x3"](x))], dim=1)
        return x.mean(dim=(2, 3))


FEATURE_NETWORKS: dict[str, Callable[[str], FeatureNetwork]] = {
    "inception": InceptionFeatures,
    "vgg19": Vgg19Features,
    "squeezenet": SqueezeNetFeatures,
}
"""By the name that the command line has for them. Each is made from the path of its weights."""
