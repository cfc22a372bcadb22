"""SSDD: alignment of the decoder's tokens with those of a frozen backbone (REPA; docs/spec.md#ssdd-training)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msdd_fast.families.ssdd.config import SSDDConfig
from msdd_fast.training.loop.config import AdamConfig
from msdd_fast.training.loop.objective import Critic, Loss

_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_COSINE_EPS = 1e-5


class Backbone(Protocol):
    """A frozen network that gives patch tokens, such as DINOv2."""

    patch_size: int
    width: int

    def __call__(self, images: Tensor) -> Tensor:
        """ImageNet-normalised (B, 3, patch_size * h, patch_size * w) to (B, h * w, width), row-major."""
        ...


class Aligned(NamedTuple):
    """Tokens of the decoder (B, N, C) and of the backbone (B, N, width), both detached."""

    tokens: Tensor
    features: Tensor


class Alignment:
    """One minus the mean cosine between the backbone's tokens and a learned projection of the decoder's.

    The projection, ``head``, is trained as a ``Critic``: on the same loss, with its own optimiser and clipping.

    Args:
        backbone: frozen; not part of any checkpoint.
        model: config of the tokenizer.
        optim: of the projection.
    """

    def __init__(self, backbone: Backbone, model: SSDDConfig, optim: AdamConfig | None = None) -> None:
        channels = model.decoder.widths[-1]
        self.backbone, self.layer = backbone, min(4, model.decoder.mid_layers // 2)
        self.head = nn.Sequential(nn.Linear(channels, channels), nn.SiLU(), nn.Linear(channels, backbone.width))
        self.critic = Critic(self.head, self._critic_loss, optim or AdamConfig())

    def distance(self, tokens: Tensor, images: Tensor) -> tuple[Tensor, Aligned]:
        """Distance of tokens (B, h * w, C), whose map covers images (B, 3, 8 h, 8 w) in [-1, 1], from the backbone's.

        The projection gets no gradient from it; it learns from the second result, in the critic's step.
        """
        features = self.features(images)
        with self._frozen():
            return cosine_distance(self.head(tokens), features), Aligned(tokens.detach(), features)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """The backbone's tokens, one per token of the decoder."""
        mean, std = (images.new_tensor(v).view(3, 1, 1) for v in (_IMAGENET_MEAN, _IMAGENET_STD))
        size = [s // 8 * self.backbone.patch_size for s in images.shape[-2:]]
        x = ((images + 1) / 2 - mean) / std
        return self.backbone(F.interpolate(x, size=size, mode="bicubic", align_corners=False))

    def _critic_loss(self, aligned: Sequence[Aligned]) -> Loss:
        """The same loss on all micro-batches of a step together."""
        tokens, features = torch.cat([a.tokens for a in aligned]), torch.cat([a.features for a in aligned])
        return Loss(cosine_distance(self.head(tokens), features), {})

    @contextmanager
    def _frozen(self) -> Iterator[None]:
        self.head.requires_grad_(False)
        try:
            yield
        finally:
            self.head.requires_grad_(True)


def cosine_distance(a: Tensor, b: Tensor) -> Tensor:
    """One minus the mean cosine along the last axis."""
    return 1 - F.cosine_similarity(a.float(), b.float(), dim=-1, eps=_COSINE_EPS).mean()
