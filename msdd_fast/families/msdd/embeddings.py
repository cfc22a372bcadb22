"""Patch and time embeddings (docs/spec.md#cross-block, docs/spec.md#adaln)."""

from __future__ import annotations

import math

from torch import Tensor, nn

from msdd_fast.diffusion.sinusoids import sinusoids


class PatchEmbed(nn.Conv2d):
    """Non-overlapping patches to tokens: (B, 3, H, W) -> (B, H/p * W/p, D), row-major."""

    def __init__(self, patch_size: int, hidden_size: int) -> None:
        super().__init__(3, hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, input: Tensor) -> Tensor:  # name fixed by nn.Conv2d
        return super().forward(input).flatten(2).transpose(1, 2)


def unpatchify(tokens: Tensor, patch_size: int) -> Tensor:
    """Tokens to pixels: (B, g*g, p*p*3) -> (B, 3, g*p, g*p); inside a token (py, px, channel), channel fastest."""
    batch, count, _ = tokens.shape
    grid = math.isqrt(count)
    x = tokens.view(batch, grid, grid, patch_size, patch_size, 3)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(batch, 3, grid * patch_size, grid * patch_size)


class TimestepEmbedder(nn.Module):
    """Sinusoid of the model time t in (0, 1], then a two-layer MLP: (B,) -> (B, D).

    256 features, cosines first, frequencies exp(-ln(10000) i / 128).
    """

    num_features = 256

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(self.num_features, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )

    def features(self, t: Tensor) -> Tensor:
        """Sinusoids float32 (B, num_features) of t (B,)."""
        return sinusoids(t, self.num_features)

    def forward(self, t: Tensor) -> Tensor:
        return self.mlp(self.features(t).to(next(self.mlp.parameters()).dtype))
