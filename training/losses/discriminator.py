"""The discriminator: trained heads on the features of a frozen network (docs/spec.md#adversarial)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from msdd_fast.training.losses.augment import augment
from msdd_fast.training.losses.dino import PatchFeatures
from msdd_fast.training.losses.vgg_features import VggFeatures


class BatchNorm(nn.Module):
    """Batch normalisation of (B, C, L) over B, L and all processes, always with the statistics of the batch.

    Two passes in float32, differentiable through the statistics. Unlike ``nn.SyncBatchNorm`` it works with any
    ``torch.distributed`` backend, also on the CPU. It has no running averages, since a discriminator has no inference.
    """

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        count = x.new_full((1,), x.shape[0] * x.shape[2])
        total = _sum_over_processes(torch.cat([x.sum(dim=(0, 2)), count]))
        count = total[-1].detach()
        centred = x - (total[:-1] / count)[:, None]
        variance = _sum_over_processes(centred.square().sum(dim=(0, 2))) / count
        return centred * (variance + self.eps).rsqrt()[:, None] * self.weight[:, None] + self.bias[:, None]


def _sum_over_processes(x: Tensor) -> Tensor:
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return x
    from torch.distributed.nn.functional import all_reduce

    out: Tensor = all_reduce(x)  # differentiable: its backward sums the gradients of all processes
    return out


class Head(nn.Module):
    """Logits (B, L) of features (B, C, L): h = block1(x), h = (h + block9(h)) / sqrt(2), linear to one channel.

    block_k: circular convolution of width k along the tokens with spectral normalisation, BatchNorm, LeakyReLU 0.2.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.point = _block(channels, 1)
        self.wide = _block(channels, 9)
        self.out = spectral_norm(nn.Conv1d(channels, 1, 1), eps=1e-12)

    def forward(self, x: Tensor) -> Tensor:
        h = self.point(x)
        h = (h + self.wide(h)) * 0.5**0.5
        out: Tensor = self.out(h)
        return out.flatten(1)


def _block(channels: int, width: int) -> nn.Sequential:
    conv = nn.Conv1d(channels, channels, width, padding=width // 2, padding_mode="circular")
    return nn.Sequential(spectral_norm(conv, eps=1e-12), BatchNorm(channels), nn.LeakyReLU(0.2))


class Discriminator(nn.Module):
    """Logits of images: one head per feature map of a frozen network. Computes in float32, also under autocast.

    Args:
        features: the frozen backbone. Not a submodule, so that neither the optimiser nor a saved state contains it.
    """

    def __init__(self, features: PatchFeatures | VggFeatures) -> None:
        super().__init__()
        self._features = (features,)
        self.name = features.name
        self.heads = nn.ModuleList(Head(width) for width in features.widths)

    def forward(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """(B, 3, H, W) in [-1, 1] to (B, tokens of all maps); ``generator`` (CPU) draws the crop."""
        (features,) = self._features
        with torch.autocast(images.device.type, enabled=False):
            maps = features(fit(images.float(), features.image_size, generator))
            return torch.cat([head(m) for head, m in zip(self.heads, maps, strict=True)], dim=1)

    def change_under_augmentation(
        self, images: Tensor, logits: Tensor, uniform: Tensor, generator: torch.Generator
    ) -> Tensor:
        """Consistency regularisation: mean squared change of ``logits`` when ``uniform`` augments ``images``."""
        return F.mse_loss(self(augment(images, uniform), generator), logits)

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Inside the block the heads get no gradients; the images still do."""
        self.requires_grad_(False)
        try:
            yield
        finally:
            self.requires_grad_(True)


def fit(images: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Images at the backbone's resolution (docs/spec.md#adversarial).

    Larger images: with probability 1/2 a random crop, the same for the whole batch, else area averaging. Smaller images
    are enlarged bicubically; the authors have none.
    """
    height, width = images.shape[-2:]
    if (height, width) == (size, size):
        return images
    if min(height, width) < size:
        return F.interpolate(images, size=(size, size), mode="bicubic")
    crop, top, left = torch.rand(3, generator=generator).tolist()
    if crop < 0.5:
        y, x = int(top * (height - size + 1)), int(left * (width - size + 1))
        return images[..., y : y + size, x : x + size]
    return F.interpolate(images, size=(size, size), mode="area")
