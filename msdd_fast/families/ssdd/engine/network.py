"""SSDD's velocity network over packed weights and channels-last maps. Same arithmetic as decoder.py.

What depends on the latents alone is computed once per image (``context``). Its modulations stay at the latents'
resolution: the norms read them there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from msdd_fast import profiling
from msdd_fast.families.ssdd.decoder import MID_NORM_EPS, NORM_EPS
from msdd_fast.families.ssdd.engine.tables import SSDDStep
from msdd_fast.families.ssdd.engine.weights import ResWeights, SSDDWeights, TransformerWeights
from msdd_fast.layers.convolution import Norm, as_map, channels_last, repeated, rows
from msdd_fast.ops import Ops


class SSDDContext(NamedTuple):
    """What depends on z alone.

    Attributes:
        latents_in: (B, C_0, H, W), the latents' part of the first convolution; in strips the latents, (B, zc, H, W).
        modulations: (scale, shift), each (B, Cin, h, w), of every residual block's first norm.
        adaln: (shift, scale), each (B * H/8 * W/8, C), of every transformer block.
    """

    latents_in: Tensor
    modulations: list[tuple[Tensor, Tensor]]
    adaln: list[tuple[Tensor, Tensor]]


class SSDDNetwork:
    """Computes the context and evaluates the velocity. ``ops`` are those of ``bound_ops.bind``."""

    def __init__(self, weights: SSDDWeights, groups: int, heads: int, factor: int, ops: Ops) -> None:
        self.w, self.groups, self.heads, self.factor, self.ops = weights, groups, heads, factor, ops
        width = weights.mid.proj_in.out_features
        blocks = [b for level in (*weights.down, *weights.up) for b in level.blocks]
        self._widths = [2 * b.conv1.in_channels for b in blocks]
        device, channels = weights.mid.proj_in.device, weights.context[1].out_channels
        self._ones, self._one = torch.ones(1, width, device=device), torch.ones((), device=device)
        self._ones_of_context = torch.ones(1, channels, device=device, dtype=weights.dtype)

    def context(self, z: Tensor) -> SSDDContext:
        """Of latents (B, zc, h, w)."""
        z = channels_last(z.to(self.w.dtype))
        latents_in = self._latents_in(repeated(z, self.factor))
        first, second = self.w.context
        c = second((first((z,)),), silu=True)
        modulations = as_map(self.w.modulations(rows(c)), c).split(self._widths, dim=1)
        adaln = self.w.adaln(self.ops.swiglu(rows(c), self._ones_of_context.expand(len(rows(c)), -1)))  # SiLU
        if self.factor != 8:  # the transformer's tokens are pixels of the map at an eighth: each takes its cell's
            adaln = rows(repeated(as_map(adaln, c), self.factor // 8))
        shifts_scales = adaln.chunk(2 * len(self.w.mid.blocks), dim=1)
        return SSDDContext(
            latents_in,
            [_pair(m, dim=1) for m in modulations],
            list(zip(shifts_scales[::2], shifts_scales[1::2], strict=True)),
        )

    def velocity(self, x: Tensor, context: SSDDContext, step: SSDDStep) -> Tensor:
        """Velocity (B, 3, H, W), channels-last, in the engine's dtype, of states (B, 3, H, W)."""
        norms = zip(context.modulations, step.norms, strict=True)
        h = self._first(x, context)
        skips = [h]
        for level in profiling.ranges(self.w.down, lambda i: f"down {i}"):
            for block in level.blocks:
                h = self._residual(block, (h,), *next(norms))
                skips.append(h)
            if level.resample is not None:
                h = level.resample((h,))
                skips.append(h)
        h = self._middle(h, context)
        for level in profiling.ranges(self.w.up, lambda i: f"up {i}"):
            for block in level.blocks:
                h = self._residual(block, (h, skips.pop()), *next(norms))
            if level.resample is not None:
                h = level.resample((h,))
        return self._last(h)

    # What ``strips.SSDDStrips`` does otherwise.

    def _latents_in(self, z: Tensor) -> Tensor:
        """What is kept of latents at full size."""
        return self.w.latents_in((z,))

    def _first(self, x: Tensor, context: SSDDContext) -> Tensor:
        return self.w.image_in((channels_last(x.to(self.w.dtype)),), added=(context.latents_in,))

    def _last(self, h: Tensor) -> Tensor:
        return self.w.out((h,), Norm(self.groups, NORM_EPS, *self.w.norm_out), silu=True)

    def _residual(
        self, w: ResWeights, maps: Sequence[Tensor], modulation: tuple[Tensor, Tensor], norm: tuple[Tensor, Tensor]
    ) -> Tensor:
        """A residual block of one map or two, joined along the channels."""
        h = w.conv1(maps, Norm(self.groups, NORM_EPS, None, None, *modulation), silu=True)
        return w.conv2((h,), Norm(self.groups, NORM_EPS, *norm), silu=True, added=maps)

    def _middle(self, h: Tensor, context: SSDDContext) -> Tensor:
        w = self.w.mid
        y = self.ops.group_norm_modulate_silu(h, self.groups, MID_NORM_EPS, *w.norm, None, None, False)
        x = w.proj_in(rows(y))
        modulations: Iterator[tuple[Tensor, Tensor]] = iter(context.adaln)
        shift, scale = next(modulations)
        a = self.ops.norm_modulate(x, shift, scale, None, NORM_EPS)
        for block in profiling.ranges(w.blocks, lambda i: f"layer {i}"):
            y = self._attention(block, a, h)
            x, a = self._add_and_norm(x, y, block.shift, block.scale)
            value, gate = block.value_gate(a).chunk(2, dim=1)
            y = block.down(self.ops.geglu(value, gate))
            following = next(modulations, None)
            if following is None:
                x = self._sum(x, y)
            else:
                x, a = self._add_and_norm(x, y, *following)
        return as_map(self._sum(w.proj_out(x), rows(h)), h)

    def _sum(self, x: Tensor, y: Tensor) -> Tensor:
        """x + y."""
        return self.ops.euler_step(x, y, self._one)

    def _add_and_norm(self, x: Tensor, y: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """x + y, and its norm; there is no gate, which is a gate of 1."""
        gate = self._ones.expand(len(shift), -1)
        return self.ops.gate_residual_norm_modulate(x, y, gate, shift, scale, None, NORM_EPS)

    def _attention(self, w: TransformerWeights, a: Tensor, like: Tensor) -> Tensor:
        """Of rows (B * H * W, C), after its output projection; ``like`` (B, C, H, W) says the sizes."""
        b, _, height, width = like.shape
        q, k, v = w.qkv(a).view(b, height * width, 3, self.heads, -1).unbind(2)
        return w.out(self.ops.window_attention(q, k, v, w.table, height, width).reshape(len(a), -1))


def _pair(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    first, second = x.chunk(2, dim)
    return first, second
