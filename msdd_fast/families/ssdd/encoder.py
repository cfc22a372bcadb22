"""The convolutional KL encoder of latent diffusion: images to a Gaussian over spatial latents.

Modules and parameters have the names of the released files; no scaling or shift follows (docs/spec.md#ssdd-encoder).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msdd_fast.families.ssdd.config import SSDDConfig

GROUPS, NORM_EPS = 32, 1e-6
BLOCKS_PER_LEVEL = 2
LOGVAR_MIN, LOGVAR_MAX = -30.0, 20.0


@dataclass(frozen=True)
class Gaussian:
    """A diagonal Gaussian over latents; ``mean`` and ``logvar`` (B, C, h, w)."""

    mean: Tensor
    logvar: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """mean + exp(logvar / 2) * noise, with unit normals of the mean's shape."""
        return self.mean + torch.exp(0.5 * self.logvar) * noise

    def kl(self) -> Tensor:
        """Divergence from the unit normal, one number per image (B,): sum of (mean^2 + var - 1 - logvar) / 2."""
        return 0.5 * (self.mean.square() + self.logvar.exp() - 1 - self.logvar).flatten(1).sum(dim=1)


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(GROUPS, channels, NORM_EPS)


class ResBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = _norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = _norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.nin_shortcut is None else self.nin_shortcut(x))


class Attention(nn.Module):
    """Self-attention over all pixels, one head."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (f(y).flatten(2).transpose(1, 2)[:, None] for f in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(q, k, v)[:, 0]
        return x + self.proj_out(out.transpose(1, 2).unflatten(2, x.shape[-2:]))


class Downsample(nn.Module):
    """Stride 2; zeros are added at the right and the bottom only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Level(nn.Module):
    """Two residual blocks, and a stride-2 convolution unless it is the ``last`` level."""

    def __init__(self, in_channels: int, out_channels: int, last: bool) -> None:
        super().__init__()
        self.block = nn.ModuleList(
            ResBlock(in_channels if j == 0 else out_channels, out_channels) for j in range(BLOCKS_PER_LEVEL)
        )
        self.downsample = None if last else Downsample(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        return x if self.downsample is None else self.downsample(x)


class Middle(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1 = ResBlock(channels, channels)
        self.attn_1 = Attention(channels)
        self.block_2 = ResBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class KLEncoder(nn.Module):
    """(B, 3, H, W) in [-1, 1] -> latents (B, latent_channels, H/factor, W/factor): the mode of the Gaussian."""

    def __init__(self, config: SSDDConfig) -> None:
        super().__init__()
        self.config = config
        zc, base = config.latent_channels, config.encoder.channels
        levels = config.factor.bit_length()  # one halving between neighbours
        widths = [base * min(4, 2**i) for i in range(levels)]
        self.conv_in = nn.Conv2d(3, base, 3, padding=1)
        self.down = nn.ModuleList(
            Level(widths[max(i - 1, 0)], width, i == levels - 1) for i, width in enumerate(widths)
        )
        self.mid = Middle(widths[-1])
        self.norm_out = _norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 2 * zc, 3, padding=1)
        self.out_proj = nn.Conv2d(2 * zc, 2 * zc, 1)
        if not self.conv_in.weight.is_meta:  # else a checkpoint fills it
            self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Convolutions N(0, 0.02), biases 0 (docs/spec.md#ssdd-network)."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @property
    def blocks(self) -> list[nn.Module]:
        """The units in which training may recompute activations."""
        return [m for m in self.modules() if isinstance(m, (ResBlock, Attention))]

    def posterior(self, images: Tensor) -> Gaussian:
        """The Gaussian over the latents of ``images``; its log-variance is kept in [-30, 20]."""
        h = self.conv_in(images.to(self.conv_in.weight.dtype))
        for level in self.down:
            h = level(h)
        h = self.conv_out(F.silu(self.norm_out(self.mid(h))))
        mean, logvar = self.out_proj(h).chunk(2, dim=1)
        return Gaussian(mean, logvar.clamp(LOGVAR_MIN, LOGVAR_MAX))

    def forward(self, images: Tensor) -> Tensor:
        return self.posterior(images).mean
