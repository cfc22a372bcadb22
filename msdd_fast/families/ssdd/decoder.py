"""SSDD's velocity network: a U-Net with a transformer in the middle (docs/spec.md#ssdd-network).

The latents z condition every norm before a residual block's first convolution and every attention norm; time conditions
the norm before the second convolution, and never enters the transformer. Modules and parameters have the names of the
released files. Maps are (B, C, H, W), tokens (B, N, C), q, k, v (B, N, heads, head_dim).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msdd_fast.diffusion.sinusoids import sinusoids
from msdd_fast.errors import InputError
from msdd_fast.families.ssdd.config import SSDDConfig
from msdd_fast.ops.group_norm_modulate_silu import group_norm_modulate_silu
from msdd_fast.ops.window_attention import window_attention

NORM_EPS = 1e-5
MID_NORM_EPS = 1e-6
# The time that the network sees is 1000 times the noise level.
TIME_SCALE = 1000.0
DOWN_BLOCKS, UP_BLOCKS = 2, 3


def down_blocks(widths: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(level, channels in, channels out) of the residual blocks on the way down."""
    for level, (above, width) in enumerate(pairwise((widths[0], *widths))):
        for j in range(DOWN_BLOCKS):
            yield level, above if j == 0 else width, width


def up_blocks(widths: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """The same on the way up; the inputs have a skip in them."""
    last = len(widths) - 1
    for level in range(last, -1, -1):
        below = widths[min(level + 1, last)]
        skips = [widths[level]] * (UP_BLOCKS - 1) + [widths[max(level - 1, 0)]]
        for j in range(UP_BLOCKS):
            yield level, (below if j == 0 else widths[level]) + skips[j], widths[level]


class TimeEmbedding(nn.Module):
    """Model time t (B,) in [0, 1] -> (B, 4 C): sinusoids of 1000 t, two linears."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(width, 4 * width)
        self.linear_2 = nn.Linear(4 * width, 4 * width)

    def forward(self, t: Tensor) -> Tensor:
        features = sinusoids(TIME_SCALE * t.float(), self.linear_1.in_features)
        return self.linear_2(F.silu(self.linear_1(features.to(self.linear_1.weight.dtype))))


class AdaGroupNorm(nn.Module):
    """Scale and shift of a GroupNorm without weights, from the context map: (B, C_0, h, w) -> 2 x (B, C, h, w)."""

    def __init__(self, context: int, channels: int) -> None:
        super().__init__()
        self.ctx_proj = nn.Conv2d(context, 2 * channels, 1)

    def forward(self, c: Tensor) -> tuple[Tensor, ...]:
        return self.ctx_proj(c).chunk(2, dim=1)


class ResBlock(nn.Module):
    """(norm by z, SiLU, conv), (norm by time, SiLU, conv), residual."""

    def __init__(self, in_channels: int, out_channels: int, context: int, groups: int) -> None:
        super().__init__()
        self.groups = groups
        self.norm1 = AdaGroupNorm(context, in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(4 * context, 2 * out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels, NORM_EPS)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor, c: Tensor, te: Tensor) -> Tensor:
        """x (B, Cin, H, W), context map c (B, C_0, h, w), te = SiLU(time embedding) (B, 4 C_0) -> (B, Cout, H, W)."""
        scale, shift = self.norm1(c)
        h = self.conv1(group_norm_modulate_silu(x, self.groups, NORM_EPS, scale=scale, shift=shift))
        scale, shift = self.time_emb_proj(te).chunk(2, dim=1)
        norm = self.norm2
        h = self.conv2(group_norm_modulate_silu(h, self.groups, NORM_EPS, norm.weight, norm.bias, scale, shift))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class DownBlock(nn.Module):
    """Two residual blocks, and a stride-2 convolution unless it is the ``last`` level."""

    def __init__(self, in_channels: int, out_channels: int, context: int, groups: int, last: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            ResBlock(in_channels if j == 0 else out_channels, out_channels, context, groups) for j in range(DOWN_BLOCKS)
        )
        self.downsamplers = nn.ModuleList([] if last else [Downsample(out_channels)])

    def forward(self, x: Tensor, c: Tensor, te: Tensor) -> list[Tensor]:
        """The outputs of all its parts, in order."""
        outputs = []
        for resnet in self.resnets:
            x = resnet(x, c, te)
            outputs.append(x)
        for downsample in self.downsamplers:
            x = downsample(x)
            outputs.append(x)
        return outputs


class UpBlock(nn.Module):
    """Three residual blocks, each on its input and one skip of ``skips`` channels, and an upsampling convolution."""

    def __init__(self, channels: int, below: int, skips: list[int], context: int, groups: int, last: bool) -> None:
        super().__init__()
        inputs = [below] + [channels] * (len(skips) - 1)
        self.resnets = nn.ModuleList(
            ResBlock(width + skip, channels, context, groups) for width, skip in zip(inputs, skips, strict=True)
        )
        self.upsamplers = nn.ModuleList([] if last else [Upsample(channels)])

    def forward(self, x: Tensor, skips: list[Tensor], c: Tensor, te: Tensor) -> Tensor:
        """Takes its skips from the end of the list."""
        for resnet in self.resnets:
            x = resnet(torch.cat([x, skips.pop()], dim=1), c, te)
        for upsample in self.upsamplers:
            x = upsample(x)
        return x


class AdaLayerNorm(nn.Module):
    """LayerNorm without weights, modulated by latent cell: LN(x) * (1 + scale) + shift."""

    def __init__(self, context: int, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(context, 2 * width)

    def forward(self, x: Tensor, cells: Tensor, height: int, width: int) -> Tensor:
        """x (B, height * width, C), cells (B, h, w, C_0) after SiLU; a token takes the values of its cell."""
        shift, scale = (
            F.interpolate(m.permute(0, 3, 1, 2), size=(height, width), mode="nearest").flatten(2).transpose(1, 2)
            for m in self.linear(cells).chunk(2, dim=-1)
        )
        return F.layer_norm(x, x.shape[-1:], eps=NORM_EPS) * (1 + scale) + shift


class RelativePositionBias(nn.Module):
    """Learned score of every offset in the window, (2w - 1, 2w - 1, heads)."""

    def __init__(self, window: int, heads: int) -> None:
        super().__init__()
        self.relative_bias_table = nn.Parameter(torch.empty(2 * window - 1, 2 * window - 1, heads))


class WindowAttention(nn.Module):
    """Projections of the window attention; no bias on q, k and v, no norm on q and k."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(width, width, bias=False)
        self.to_v = nn.Linear(width, width, bias=False)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, table: Tensor, height: int, width: int) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)) for f in (self.to_q, self.to_k, self.to_v))
        return self.out_proj(window_attention(q, k, v, table, height, width).flatten(2))


class GegluInput(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """GEGLU with four times the width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj_in_act = GegluInput(width, 4 * width)
        self.proj_out = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj_out(self.proj_in_act(x))


class TransformerBlock(nn.Module):
    """Window attention under a norm by z, then GEGLU under a plain norm."""

    def __init__(self, width: int, heads: int, window: int, context: int) -> None:
        super().__init__()
        self.norm1 = AdaLayerNorm(context, width)
        self.attn1 = WindowAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, NORM_EPS)
        self.ff = FeedForward(width)
        self.relative_position_bias = RelativePositionBias(window, heads)

    def forward(self, x: Tensor, cells: Tensor, height: int, width: int) -> Tensor:
        table = self.relative_position_bias.relative_bias_table
        x = x + self.attn1(self.norm1(x, cells, height, width), table, height, width)
        return x + self.ff(self.norm2(x))


class MidBlock(nn.Module):
    """The transformer over the map of an eighth of the resolution, one token a pixel; residual."""

    def __init__(self, width: int, layers: int, heads: int, window: int, context: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, width, MID_NORM_EPS)
        self.proj_in = nn.Linear(width, width)
        self.transformer_blocks = nn.ModuleList(TransformerBlock(width, heads, window, context) for _ in range(layers))
        self.proj_out = nn.Linear(width, width)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        tokens = x
        for tokens in self.states(x, c):  # noqa: B007 (the last one)
            pass
        return self.finish(x, tokens)

    def states(self, x: Tensor, c: Tensor) -> Iterator[Tensor]:
        """The tokens (B, H * W, C) after each transformer block."""
        height, width = x.shape[-2:]
        norm = self.norm
        y = group_norm_modulate_silu(x, norm.num_groups, norm.eps, norm.weight, norm.bias, silu=False)
        tokens = self.proj_in(y.flatten(2).transpose(1, 2))
        cells = F.silu(c).permute(0, 2, 3, 1)
        for block in self.transformer_blocks:
            tokens = block(tokens, cells, height, width)
            yield tokens

    def finish(self, x: Tensor, tokens: Tensor) -> Tensor:
        """The last tokens to a map, plus the block's input."""
        return self.proj_out(tokens).transpose(1, 2).unflatten(2, x.shape[-2:]) + x


class UViTDecoder(nn.Module):
    """v(x_t, t, z) of an SSDD tokenizer: the noise minus the image, as in all of this library.

    The authors' network gives the image minus the noise; ``conv_out`` here is the negative of theirs.
    """

    def __init__(self, config: SSDDConfig) -> None:
        super().__init__()
        self.config = config
        dec, zc = config.decoder, config.latent_channels
        widths, groups, context = dec.widths, dec.groups, dec.widths[0]
        self.conv_in = nn.Conv2d(3 + zc, context, 3, padding=1)
        self.time_embedding = TimeEmbedding(context)
        self.ada_ctx_proj = nn.Sequential(
            nn.Conv2d(zc, context, 3, padding=1), nn.SiLU(), nn.Conv2d(context, context, 3, padding=1)
        )
        self.down_blocks = nn.ModuleList()
        skips = [context]  # channels of everything that the way up will read, in order of making
        for i, (above, width) in enumerate(pairwise((context, *widths))):
            last = i == len(widths) - 1
            self.down_blocks.append(DownBlock(above, width, context, groups, last))
            skips += [width] * (DOWN_BLOCKS + (not last))
        self.mid_block = MidBlock(widths[-1], dec.mid_layers, dec.heads, dec.window, context, groups)
        self.up_blocks = nn.ModuleList()
        for i, (below, width) in enumerate(pairwise((widths[-1], *reversed(widths)))):
            taken = [skips.pop() for _ in range(UP_BLOCKS)]
            self.up_blocks.append(UpBlock(width, below, taken, context, groups, i == len(widths) - 1))
        self.conv_norm_out = nn.GroupNorm(groups, context, NORM_EPS)
        self.conv_out = nn.Conv2d(context, 3, 3, padding=1)
        if not self.conv_in.weight.is_meta:  # else a checkpoint fills it
            self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Convolutions N(0, 0.02), linears Xavier, all biases and bias tables 0; both residual branches that end in a
        convolution or a feed-forward start at zero (docs/spec.md#ssdd-network)."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.02)
            elif isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
            if isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None:
                nn.init.zeros_(module.bias)
            if isinstance(module, RelativePositionBias):
                nn.init.zeros_(module.relative_bias_table)
        for module in self.modules():
            if isinstance(module, ResBlock):
                nn.init.zeros_(module.conv2.weight)
            elif isinstance(module, FeedForward):
                nn.init.zeros_(module.proj_out.weight)

    @property
    def blocks(self) -> list[nn.Module]:
        """The units in which training may recompute activations."""
        return [m for m in self.modules() if isinstance(m, (ResBlock, TransformerBlock))]

    def forward(self, x_t: Tensor, t: Tensor, z: Tensor | None) -> Tensor:
        """Velocity at ``x_t``.

        Args:
            x_t: (B, 3, H, W), sides of z times ``config.factor``.
            t: (B,), noise level in [0, 1].
            z: (B, latent_channels, h, w). None, the null context of other families, is an error.

        Returns the velocity, shape and dtype of ``x_t``. Raises InputError for wrong shapes.
        """
        z = self._check(x_t, t, z)
        h, skips, c, te = self.way_down(x_t, t, z)
        h = self.mid_block(h, c)
        return self.way_up(h, skips, c, te).to(x_t.dtype)

    def forward_with_tokens(self, x_t: Tensor, t: Tensor, z: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """``forward``, and the tokens (B, H/8 * W/8, C) after transformer block ``layer``, for feature alignment."""
        z = self._check(x_t, t, z)
        h, skips, c, te = self.way_down(x_t, t, z)
        states = list(self.mid_block.states(h, c))
        h = self.mid_block.finish(h, states[-1])
        return self.way_up(h, skips, c, te).to(x_t.dtype), states[layer]

    def way_down(self, x_t: Tensor, t: Tensor, z: Tensor) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
        """The coarsest map, the skips, the context map, and SiLU of the time embedding."""
        dtype = self.conv_in.weight.dtype
        z = z.to(dtype)
        h = self.conv_in(torch.cat([x_t.to(dtype), F.interpolate(z, size=x_t.shape[-2:], mode="nearest")], dim=1))
        c = self.ada_ctx_proj(z)
        te = F.silu(self.time_embedding(t))
        skips = [h]
        for block in self.down_blocks:
            skips += block(skips[-1], c, te)
        return skips[-1], skips, c, te

    def way_up(self, h: Tensor, skips: list[Tensor], c: Tensor, te: Tensor) -> Tensor:
        for block in self.up_blocks:
            h = block(h, skips, c, te)
        norm = self.conv_norm_out
        return self.conv_out(group_norm_modulate_silu(h, norm.num_groups, norm.eps, norm.weight, norm.bias))

    def _check(self, x_t: Tensor, t: Tensor, z: Tensor | None) -> Tensor:
        """z, after all three are found to have the right shapes."""
        factor, channels = self.config.factor, self.config.latent_channels
        if z is None:
            raise InputError("z must be a torch.Tensor (an SSDD decoder has no null context), got None")
        if x_t.ndim != 4 or x_t.shape[1] != 3 or any(s < 1 or s % factor for s in x_t.shape[-2:]):
            raise InputError(f"x_t must be (B, 3, H, W), sides multiples of {factor}, got {tuple(x_t.shape)}")
        if t.shape != (len(x_t),):
            raise InputError(f"t must be ({len(x_t)},), one time per image, got {tuple(t.shape)}")
        expected = (len(x_t), channels, *(s // factor for s in x_t.shape[-2:]))
        if z.shape != expected:
            raise InputError(f"z must be {expected}, got {tuple(z.shape)}")
        return z
