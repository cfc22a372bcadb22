"""SSDD's velocity network over packed weights and channels-last maps. Same arithmetic as models/ssdd.py.

What depends on the latents alone is computed once per image (``context``). Its modulations stay at the latents'
resolution: the norms read them there. A shortcut's product is added to the convolution's result where it lies.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from msdd_fast import profiling
from msdd_fast.families.ssdd.decoder import MID_NORM_EPS, NORM_EPS
from msdd_fast.families.ssdd.engine.tables import SSDDStep
from msdd_fast.families.ssdd.engine.weights import ResWeights, SSDDWeights, TransformerWeights
from msdd_fast.layers.convolution import as_map, channels_last, rows
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
        self._widths = [2 * b.conv1.weight.shape[1] for b in blocks]
        self._ones = torch.ones(1, width, device=weights.mid.proj_in.device)

    def context(self, z: Tensor) -> SSDDContext:
        """Of latents (B, zc, h, w)."""
        z = channels_last(z.to(self.w.dtype))
        height, width = (s * self.factor for s in z.shape[2:])
        latents_in = self._latents_in(channels_last(F.interpolate(z, (height, width), mode="nearest")))
        first, second = self.w.context
        c = second(F.silu(first(z)))
        modulations = as_map(self.w.modulations(rows(c)), c).split(self._widths, dim=1)
        adaln = self.w.adaln(F.silu(rows(c)))
        if self.factor != 8:  # the transformer's tokens are pixels of the map at an eighth: each takes its cell's
            cells = F.interpolate(as_map(adaln, c), (height // 8, width // 8), mode="nearest")
            adaln = rows(channels_last(cells))
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
                h = self._residual(block, h, *next(norms))
                skips.append(h)
            if level.resample is not None:
                h = level.resample(h)
                skips.append(h)
        h = self._middle(h, context)
        for level in profiling.ranges(self.w.up, lambda i: f"up {i}"):
            for block in level.blocks:
                h = self._joined(block, h, skips, *next(norms))
            if level.resample is not None:
                h = level.resample(h)
        return self._last(h)

    # What ``strips.SSDDStrips`` does otherwise.

    def _latents_in(self, z: Tensor) -> Tensor:
        """What is kept of latents at full size."""
        return self.w.latents_in(z)

    def _first(self, x: Tensor, context: SSDDContext) -> Tensor:
        h = self.w.image_in(channels_last(x.to(self.w.dtype)))
        h += context.latents_in
        return h

    def _last(self, h: Tensor) -> Tensor:
        h = self.ops.group_norm_modulate_silu(h, self.groups, NORM_EPS, *self.w.norm_out)
        return self.w.out(h)

    def _joined(
        self,
        w: ResWeights,
        h: Tensor,
        skips: list[Tensor],
        modulation: tuple[Tensor, Tensor],
        norm: tuple[Tensor, Tensor],
    ) -> Tensor:
        """A residual block of h and the last of the skips, which is taken away."""
        return self._residual(w, torch.cat([h, skips.pop()], dim=1), modulation, norm)

    def _residual(
        self, w: ResWeights, x: Tensor, modulation: tuple[Tensor, Tensor], norm: tuple[Tensor, Tensor]
    ) -> Tensor:
        x = channels_last(x)
        h = w.conv1(self.ops.group_norm_modulate_silu(x, self.groups, NORM_EPS, None, None, *modulation))
        h = w.conv2(self.ops.group_norm_modulate_silu(h, self.groups, NORM_EPS, *norm))
        if w.shortcut is None:
            return h.add_(x)
        w.shortcut(rows(x), rows(h))
        return h

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
            y = block.down(F.gelu(gate).mul_(value))
            following = next(modulations, None)
            if following is None:
                x = x.add_(y)
            else:
                x, a = self._add_and_norm(x, y, *following)
        return as_map(w.proj_out(x).add_(rows(h)), h)

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
