"""FLOP and bytes of an SSDD decode, op by op (families/work.py has the rules).

``layer`` is the index of the residual or transformer block in its order of use, -1 outside them; ``scale`` is the
height of the image, 0 for what the engine does once per image.
"""

from __future__ import annotations

from collections.abc import Iterator

from msdd_fast.families.ssdd.config import SSDDConfig
from msdd_fast.families.ssdd.decoder import DOWN_BLOCKS, UP_BLOCKS, down_blocks, up_blocks
from msdd_fast.families.work import Work


def decode_work(
    config: SSDDConfig,
    batch: int = 1,
    steps: int = 1,
    itemsize: int = 2,
    hoisted: bool = True,
    sides: tuple[int, int] | None = None,
) -> list[Work]:
    """The work of one decode of ``batch`` images of ``sides`` (height, width; default: ``config.image_size`` squared).

    ``hoisted``: as the engine runs it, with time folded into the norms, latents processed once per image, upsampling
    convolutions by phases and attention in its windows. Otherwise as the eager model runs it: everything at every step,
    dense attention.
    """
    count = _Counter(config, batch, itemsize, hoisted, sides or (config.image_size, config.image_size))
    work = list(count.latents(0)) if hoisted else []
    scale = count.height
    for _ in range(steps):
        work += [] if hoisted else [*count.latents(scale), *count.time(scale)]
        work += count.network(scale)
        work.append(count.pointwise("euler_step", -1, scale, 3 * 3 * count.pixels(0)))
    return [count.pointwise("start_noise", -1, scale, 3 * count.pixels(0)), *work]


def keys_seen(height: int, width: int, window: int) -> int:
    """Pairs of query and key of a grid that are less than ``window`` rows and columns apart."""
    near = [sum(min(n, i + window) - max(0, i - window + 1) for i in range(n)) for n in (height, width)]
    return near[0] * near[1]


class _Counter:
    def __init__(self, config: SSDDConfig, batch: int, itemsize: int, hoisted: bool, sides: tuple[int, int]) -> None:
        self.config, self.batch, self.itemsize, self.hoisted = config, batch, itemsize, hoisted
        self.height, self.width = sides
        self.widths = config.decoder.widths
        self.cells = self.height * self.width // config.factor**2
        blocks = list(down_blocks(self.widths)) + list(up_blocks(self.widths))
        self.inputs, self.outputs = [b[1] for b in blocks], [b[2] for b in blocks]

    def pixels(self, level: int) -> int:
        return self.height * self.width // 4**level

    def pointwise(self, op: str, layer: int, scale: int, elements: int) -> Work:
        """An op without products that moves so many elements per image."""
        return Work(op, layer, scale, 0, 0, elements * self.batch * self.itemsize)

    def conv(self, op: str, layer: int, scale: int, taps: int, cin: int, cout: int, read: int, written: int) -> Work:
        """``taps`` products for each of ``written`` pixels and pair of channels; 1 is a linear."""
        flops, weights = 2 * taps * cin * cout * written * self.batch, (taps * cin + 1) * cout
        moved = (cin * read + cout * written) * self.batch
        return Work(op, layer, scale, flops, weights * self.itemsize, moved * self.itemsize)

    def latents(self, scale: int) -> Iterator[Work]:
        """What depends on z alone."""
        zc, c, cells, full = self.config.latent_channels, self.widths[0], self.cells, self.pixels(0)
        yield self.conv("latents_in", -1, scale, 9, zc, c, full, full)
        yield self.conv("context", -1, scale, 9, zc, c, cells, cells)
        yield self.conv("context", -1, scale, 9, c, c, cells, cells)
        yield self.conv("modulations", -1, scale, 1, c, 2 * sum(self.inputs), cells, cells)
        width, layers = self.widths[-1], self.config.decoder.mid_layers
        yield self.conv("adaln", -1, scale, 1, c, 2 * width * layers, cells, cells)

    def time(self, scale: int) -> Iterator[Work]:
        c = self.widths[0]
        yield self.conv("time_embedding", -1, scale, 1, c, 4 * c, 1, 1)
        yield self.conv("time_embedding", -1, scale, 1, 4 * c, 4 * c, 1, 1)
        for i, cout in enumerate(self.outputs):
            yield self.conv("time_emb_proj", i, scale, 1, 4 * c, 2 * cout, 1, 1)

    def network(self, scale: int) -> Iterator[Work]:
        """One evaluation without latents and time."""
        widths, full, last = self.widths, self.pixels(0), len(self.widths) - 1
        yield self.conv("image_in", -1, scale, 9, 3, widths[0], full, full)
        if self.hoisted:
            yield self.pointwise("image_in.add", -1, scale, 3 * widths[0] * full)
        for i, (level, cin, cout) in enumerate(down_blocks(self.widths)):
            yield from self.residual(i, scale, level, cin, cout)
            if i % DOWN_BLOCKS == DOWN_BLOCKS - 1 and level < last:
                yield self.conv("downsample", i, scale, 9, cout, cout, self.pixels(level), self.pixels(level + 1))
        yield from self.middle(scale)
        for j, (level, cin, cout) in enumerate(up_blocks(self.widths)):
            i = j + DOWN_BLOCKS * len(widths)
            yield self.pointwise("cat", i, scale, 2 * cin * self.pixels(level))
            yield from self.residual(i, scale, level, cin, cout)
            if j % UP_BLOCKS == UP_BLOCKS - 1 and level > 0:
                low, high = self.pixels(level), self.pixels(level - 1)
                taps, read = (4, low) if self.hoisted else (9, high)
                yield self.conv("upsample", i, scale, taps, cout, cout, read, high)
        yield self.pointwise("norm_out", -1, scale, 3 * widths[0] * full)
        yield self.conv("out", -1, scale, 9, widths[0], 3, full, full)

    def residual(self, layer: int, scale: int, level: int, cin: int, cout: int) -> Iterator[Work]:
        n = self.pixels(level)
        yield self.pointwise("norm1", layer, scale, 3 * cin * n)
        yield self.conv("conv1", layer, scale, 9, cin, cout, n, n)
        yield self.pointwise("norm2", layer, scale, 3 * cout * n)
        yield self.conv("conv2", layer, scale, 9, cout, cout, n, n)
        if cin != cout:
            yield self.conv("shortcut", layer, scale, 1, cin, cout, n, n)
        yield self.pointwise("residual", layer, scale, 2 * cout * n)

    def middle(self, scale: int) -> Iterator[Work]:
        dec, c, level = self.config.decoder, self.widths[-1], len(self.widths) - 1
        n, height, width = self.pixels(level), self.height >> level, self.width >> level
        yield self.pointwise("mid.norm", -1, scale, 3 * c * n)
        yield self.conv("mid.proj_in", -1, scale, 1, c, c, n, n)
        pairs = keys_seen(height, width, dec.window) if self.hoisted else n * n
        for i in range(dec.mid_layers):
            yield self.pointwise("mid.norm_modulate", i, scale, 4 * c * n)
            yield self.conv("mid.qkv", i, scale, 1, c, 3 * c, n, n)
            moved = 4 * n * c * self.batch * self.itemsize
            yield Work("mid.attention", i, scale, 4 * pairs * c * self.batch, 0, moved)
            yield self.conv("mid.out", i, scale, 1, c, c, n, n)
            yield self.pointwise("mid.gate_residual_norm_modulate", i, scale, 4 * c * n)
            yield self.conv("mid.value_gate", i, scale, 1, c, 8 * c, n, n)
            yield self.pointwise("mid.geglu", i, scale, 3 * 4 * c * n)
            yield self.conv("mid.down", i, scale, 1, 4 * c, c, n, n)
        yield self.conv("mid.proj_out", -1, scale, 1, c, c, n, n)
        yield self.pointwise("mid.residual", -1, scale, 3 * c * n)
