"""How much memory an SSDD decode takes: what is alive at once, by formula, at every place where it may be most.

Counted are the tensors of the engine's decode with fused ops, not what a convolution takes inside.
"""

from __future__ import annotations

from collections.abc import Iterator

from msdd_fast.families.ssdd.config import SSDDConfig
from msdd_fast.families.ssdd.decoder import DOWN_BLOCKS, UP_BLOCKS, down_blocks, up_blocks
from msdd_fast.families.ssdd.engine.strips import MIN_ROWS
from msdd_fast.layers.request import WHOLE, Way
from msdd_fast.layers.tiles import largest_tile


def activation_bytes(
    config: SSDDConfig, cells: tuple[int, int], batch: int, itemsize: int, way: Way, fused: bool
) -> int:
    """Most bytes that a decode of ``batch`` latents of ``cells`` (h, w) holds at once, its images included.

    ``fused``: the extension convolves, without joined and normalised maps.
    """
    pixel = 3 * batch * config.factor**2
    state = 4 * pixel * cells[0] * cells[1]
    if not way.tile:
        decode = _Decode(config, cells, batch, itemsize, way.parts, fused)
        velocity = itemsize * pixel * cells[0] * cells[1]
        return max(state + decode.context() + max(decode.velocity(), velocity + state), 2 * state)
    rows, columns = largest_tile(cells, way.tile // config.factor)
    decode = _Decode(config, (rows, columns), batch, itemsize, WHOLE.parts, fused)
    part = pixel * rows * columns  # of the state, which is copied, then of the velocity, times its weights
    tile = decode.context() + max(4 * part + decode.velocity(), (itemsize + 4 + 4) * part)
    return 2 * state + max(tile, state)


class _Decode:
    def __init__(
        self, config: SSDDConfig, cells: tuple[int, int], batch: int, itemsize: int, parts: int, fused: bool
    ) -> None:
        self.config, self.parts, self.itemsize, self.fused = config, parts, itemsize, fused
        self.height, self.width, self.batch = cells[0] * config.factor, cells[1] * config.factor, batch
        self.widths = config.decoder.widths

    def map(self, level: int, channels: int) -> int:
        """Bytes of a map at a level of resolution."""
        return (self.height * self.width >> 2 * level) * channels * self.batch * self.itemsize

    def context(self) -> int:
        """What depends on the latents alone."""
        cells = self.batch * self.itemsize * self.height * self.width // self.config.factor**2
        kept = self.widths[0] if self.parts == 1 else self.config.latent_channels
        inputs = sum(cin for _, cin, _ in (*down_blocks(self.widths), *up_blocks(self.widths)))
        return self.map(0, kept) + 2 * inputs * cells + self.map(3, 2 * self.widths[3] * self.config.decoder.mid_layers)

    def velocity(self) -> int:
        """What an evaluation adds to that, its result included."""
        return max(self._places())

    def _places(self) -> Iterator[int]:
        widths, last = self.widths, len(self.widths) - 1
        skips = [self.map(0, widths[0])]
        yield self._first()
        for i, (level, cin, cout) in enumerate(down_blocks(self.widths)):
            yield sum(skips) + self._block(level, (cin,), cout)
            skips.append(self.map(level, cout))
            if i % DOWN_BLOCKS == DOWN_BLOCKS - 1 and level < last:
                skips.append(self.map(level + 1, cout))
        # The rows, their norm, two of their results, values and gates of this layer and of the one before.
        yield sum(skips) + self.map(last, 20 * widths[last])
        h = self.map(last, widths[last])
        for i, (level, cin, cout) in enumerate(up_blocks(self.widths)):
            skip = skips.pop()
            joined = (cin - skip // self.map(level, 1), skip // self.map(level, 1))
            if self.fused:
                yield sum(skips) + skip + h + self._block(level, joined, cout)
            elif self.parts == 1:
                yield sum(skips) + skip + h + self.map(level, cin)
                yield sum(skips) + h + self.map(level, cin) + self._block(level, (cin,), cout)
            else:
                yield sum(skips) + skip + h + self._block(level, joined, cout)
            h = self.map(level, cout)
            if i % UP_BLOCKS == UP_BLOCKS - 1 and level > 0:
                yield sum(skips) + h + self.map(level - 1, cout)
                h = self.map(level - 1, cout)
        yield h + self._last()

    def _first(self) -> int:
        return self.map(0, self.widths[0])

    def _block(self, level: int, inputs: tuple[int, ...], cout: int) -> int:
        """A residual block beside its inputs."""
        if self.fused:
            return self.map(level, 2 * cout)
        if self.parts == 1:
            return max(self.map(level, sum(inputs)) + self.map(level, cout), self.map(level, 3 * cout))
        return self.map(level, cout) + max(self._strip(level, inputs, cout), self._strip(level, (cout,), cout))

    def _last(self) -> int:
        if self.fused:
            return self.map(0, 3)
        if self.parts == 1:
            return self.map(0, self.widths[0] + 3)
        return self.map(0, 3) + self._strip(0, (self.widths[0],), 3)

    def _strip(self, level: int, inputs: tuple[int, ...], cout: int) -> int:
        """A strip's norm in float32, the same joined and with the rows beside it, and the result."""
        height = self.height >> level
        count = max(1, min(self.parts, height // MIN_ROWS))
        row = self.batch * (self.width >> level)
        rows = -(-height // count)
        norm = (rows + 2) * row * (self.itemsize * sum(inputs) + 4 * sum(inputs))
        return max(norm, (rows + 2) * row * self.itemsize * sum(inputs) + rows * row * self.itemsize * cout)
