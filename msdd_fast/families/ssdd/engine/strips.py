"""SSDD's velocity with everything at full width done in strips of rows: the same numbers up to the order of sums.

A norm's statistics come from one pass over a map, in strips. Its result exists for one strip at a time, with the rows
above and below that the convolution behind it reads. A residual block writes its result over its first convolution's;
what a skip is joined with is not copied. So about half of ``SSDDNetwork``'s memory is left: the skips, and two maps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from msdd_fast.families.ssdd.decoder import NORM_EPS
from msdd_fast.families.ssdd.engine.network import SSDDContext, SSDDNetwork
from msdd_fast.families.ssdd.engine.weights import ResWeights
from msdd_fast.layers.convolution import Convolution, Convolve, Separate

MIN_ROWS = 4


class Statistics(NamedTuple):
    """Mean and reciprocal deviation of every channel's group, float32 (B, C)."""

    mean: Tensor
    rstd: Tensor


class SSDDStrips(SSDDNetwork):
    """``network``, over the same weights, in ``parts`` strips."""

    def __init__(self, network: SSDDNetwork, parts: int) -> None:
        super().__init__(network.w, network.groups, network.heads, network.factor, network.ops)
        self.parts = parts

    def _latents_in(self, z: Tensor) -> Tensor:
        """The latents at full size: few channels, whose convolution is done again at every step."""
        return z

    def _first(self, x: Tensor, context: SSDDContext) -> Tensor:
        w, z = self.w, context.latents_in
        h = _empty_map(z, w.image_in.out_channels)
        image_in, latents_in = _convolution(w.image_in), _convolution(w.latents_in)
        for begin, end in self._strips(h):
            image = image_in.strip(_with_neighbours(x, begin, end).to(w.dtype))
            h[:, :, begin:end] = image.add_(latents_in.strip(_with_neighbours(z, begin, end)))
        return h

    def _last(self, h: Tensor) -> Tensor:
        statistics, out = self._statistics((h,)), _convolution(self.w.out)
        v = _empty_map(h, 3)
        for begin, end in self._strips(h):
            v[:, :, begin:end] = out.strip(self._normalised((h,), statistics, begin, end, norm=self.w.norm_out))
        return v

    def _residual(
        self, w: ResWeights, maps: Sequence[Tensor], modulation: tuple[Tensor, Tensor], norm: tuple[Tensor, Tensor]
    ) -> Tensor:
        statistics, conv1, conv2 = self._statistics(maps), _convolution(w.conv1), _convolution(w.conv2)
        h = _empty_map(maps[0], w.conv1.out_channels)
        for begin, end in self._strips(h):
            h[:, :, begin:end] = conv1.strip(self._normalised(maps, statistics, begin, end, modulation=modulation))
        statistics, above = self._statistics((h,)), None
        for begin, end in self._strips(h):
            y = self._normalised((h,), statistics, begin, end, norm=norm)
            if above is not None:  # h has been overwritten there
                y[:, :, :1] = above
            above = y[:, :, -2:-1].clone()
            y = conv2.strip(y)
            w.conv2.add_to(y, [m[:, :, begin:end] for m in maps])  # type: ignore[attr-defined]
            h[:, :, begin:end] = y
        return h

    def _strips(self, x: Tensor) -> Iterator[tuple[int, int]]:
        """First and last row, plus one, of each strip of a map."""
        height = x.shape[2]
        count = max(1, min(self.parts, height // MIN_ROWS))
        for i in range(count):
            yield height * i // count, height * (i + 1) // count

    def _statistics(self, maps: Sequence[Tensor]) -> Statistics:
        """Of the groups of ``maps`` joined along the channels."""
        means, variances = [], []
        for x in maps:
            found = [(end - begin, *_moments(x[:, :, begin:end])) for begin, end in self._strips(x)]
            mean = torch.stack([n * m for n, m, _ in found]).sum(0) / x.shape[2]
            means.append(mean)
            variances.append(torch.stack([n * (v + (m - mean) ** 2) for n, m, v in found]).sum(0) / x.shape[2])
        mean, variance = (torch.cat(t, dim=1).unflatten(1, (self.groups, -1)) for t in (means, variances))
        of_group = mean.mean(2, keepdim=True)
        variance = (variance + (mean - of_group) ** 2).mean(2, keepdim=True)
        rstd = torch.rsqrt(variance + NORM_EPS)
        return Statistics(*(t.expand_as(mean).flatten(1).float() for t in (of_group, rstd)))

    def _normalised(
        self,
        maps: Sequence[Tensor],
        statistics: Statistics,
        begin: int,
        end: int,
        norm: tuple[Tensor, Tensor] | None = None,
        modulation: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """``ops.group_norm_modulate_silu`` of ``maps`` joined, rows begin - 1 to end: those beyond the map are 0."""
        batch, _, height, width = maps[0].shape
        top, bottom = max(0, begin - 1), min(height, end + 1)
        out = maps[0].new_empty(batch, end - begin + 2, width, sum(m.shape[1] for m in maps))
        out[:, : top - begin + 1] = 0
        out[:, bottom - begin + 1 :] = 0
        inside, at = out[:, top - begin + 1 : bottom - begin + 1], 0
        for x in maps:
            mine = slice(at, at + x.shape[1])
            mean, factor = (t[:, None, None, mine] for t in statistics)
            y = torch.sub(x[:, :, top:bottom].permute(0, 2, 3, 1), mean)  # float32
            if norm is not None:
                y.mul_(factor * norm[0][mine]).add_(norm[1][mine])
            if modulation is not None:
                row = torch.arange(top, bottom, device=x.device) * modulation[0].shape[2] // height
                scale, shift = (t[:, mine].index_select(2, row).permute(0, 2, 3, 1).float() for t in modulation)
                cells = y.unflatten(2, (scale.shape[2], -1))
                cells.mul_(((1 + scale) * factor)[:, :, :, None]).add_(shift[:, :, :, None])
            inside[..., mine] = F.silu(y, inplace=True)
            at += x.shape[1]
        return out.permute(0, 3, 1, 2)


def _convolution(convolve: Convolve) -> Convolution:
    assert isinstance(convolve, Separate) and isinstance(convolve.convolution, Convolution)
    return convolve.convolution


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of every channel of some rows, float64 (B, C)."""
    variance, mean = torch.var_mean(x.float(), dim=(2, 3), correction=0)
    return mean.double(), variance.double()


def _empty_map(like: Tensor, channels: int) -> Tensor:
    b, _, height, width = like.shape
    return like.new_empty(b, height, width, channels).permute(0, 3, 1, 2)


def _with_neighbours(x: Tensor, begin: int, end: int) -> Tensor:
    """Rows begin - 1 to end of a map; those beyond it are 0."""
    top, bottom = max(0, begin - 1), min(x.shape[2], end + 1)
    return F.pad(x[:, :, top:bottom], (0, 0, top - begin + 1, end + 1 - bottom))
