"""Patch features of a frozen DINO ViT-S/16 for the discriminator (Caron et al., 2021; docs/spec.md#adversarial).

The weights come from a file or from timm's entry in the Hugging Face cache; nothing is downloaded.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msdd_fast.errors import CheckpointError
from msdd_fast.io.safetensors import read_safetensors
from msdd_fast.io.torch_files import read_torch_file
from msdd_fast.metrics._weights import copy_weight

log = logging.getLogger(__name__)

SOURCE = (
    "DINO's ViT-S/16: https://dl.fbaipublicfiles.com/dino/dino_deitsmall16_pretrain/dino_deitsmall16_pretrain.pth "
    "(SHA-256 unknown), or timm's vit_small_patch16_224.dino"
)
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        out: Tensor = self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return out


class Mlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class Block(nn.Module):
    """A pre-norm transformer layer."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    def __init__(self, patch: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, patch)


class PatchFeatures(nn.Module):
    """Patch tokens of a frozen ViT at five depths, each with the class token added.

    Parameter names are those of DINO's files and of timm. Depths: before the first block and after blocks 2, 5, 8
    and 11 of twelve; the final norm is not applied. The authors zero the biases of the keys, which changes nothing: a
    softmax is invariant to a constant added to all keys.

    Attributes:
        name: the network whose weights these are; a prefix of its metrics in the log.
        image_size: pixels per side of its input.
        widths: channels of each feature map.
    """

    taps = (0, 3, 6, 9, 12)
    mean: Tensor
    std: Tensor

    def __init__(
        self, name: str, image_size: int = 224, patch: int = 16, width: int = 384, heads: int = 6, depth: int = 12
    ) -> None:
        super().__init__()
        self.name, self.image_size, self.widths = name, image_size, (width,) * len(self.taps)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, (image_size // patch) ** 2 + 1, width))
        self.patch_embed = PatchEmbed(patch, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.register_buffer("mean", torch.tensor(_IMAGENET_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(_IMAGENET_STD).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, S, S) in [-1, 1], S = image_size, to maps (B, width, tokens). Differentiable."""
        x = ((images + 1) / 2 - self.mean) / self.std
        x = self.patch_embed.proj(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        maps = []
        for i in range(len(self.blocks) + 1):
            if i in self.taps:
                maps.append((x[:, 1:] + x[:, :1]).transpose(1, 2))
            if i < len(self.blocks):
                x = self.blocks[i](x)
        return maps


def load_dino(file_or_name: str) -> PatchFeatures:
    """DINO ViT-S/16 from a .pth or .safetensors file, or by the name of a timm model in the Hugging Face cache.

    Raises CheckpointError, which says where to get the file, if it is missing or contains another network.
    """
    path = Path(file_or_name)
    if not path.is_file():
        path = _cached_by_timm(file_or_name)
    state: Any = read_safetensors(path) if path.suffix == ".safetensors" else read_torch_file(path)
    model = PatchFeatures("dino-vit-s16")
    for name, parameter in model.named_parameters():
        copy_weight(parameter, state, name, path, SOURCE)
    if "head.weight" in state:
        raise CheckpointError(f"{path} is not {SOURCE}: it has a classifier, which self-supervised networks lack")
    return model


def _cached_by_timm(name: str) -> Path:
    missing = f"discriminator backbone not found: {name!r} is neither a file nor a timm model in the local cache"
    try:
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError
    except ImportError as e:
        raise CheckpointError(f"{missing} (huggingface_hub is not installed). It takes {SOURCE}") from e
    try:
        found = try_to_load_from_cache(f"timm/{name}", "model.safetensors")
    except HFValidationError:  # a path is not a valid repository name
        found = None
    if not isinstance(found, str):
        raise CheckpointError(f"{missing}. It takes {SOURCE}")
    return Path(found)


def random_features(seed: int = 0) -> PatchFeatures:
    """A small untrained ViT for tests; a warning and the name of its metrics say so."""
    log.warning("discriminator backbone 'random' is an untrained network, for tests only: it cannot judge images")
    model = PatchFeatures("random-vit", image_size=32, patch=8, width=32, heads=2, depth=12)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data = torch.randn(parameter.shape, generator=generator) / parameter[0].numel() ** 0.5
    return model
