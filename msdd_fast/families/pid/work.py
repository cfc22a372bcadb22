"""FLOP and bytes of a PiD decode, op by op (families/work.py has the rules).

``layer`` is the index of the joint block, or of the pixel block (names begin with "pixel."), -1 outside them; ``scale``
is the height of the image, 0 for what the engine does once per image.
"""

from __future__ import annotations

from collections.abc import Iterator

from msdd_fast.families.pid.config import TIME_WIDTH, PiDConfig, swiglu_hidden_size
from msdd_fast.families.work import Work


def decode_work(
    config: PiDConfig,
    batch: int = 1,
    steps: int = 1,
    cfg_scale: float = 1.0,
    itemsize: int = 2,
    hoisted: bool = True,
    sides: tuple[int, int] | None = None,
    text_rows: int | None = None,
) -> list[Work]:
    """The work of one decode of ``batch`` images of ``sides`` (height, width; default: ``config.image_size`` squared).

    ``hoisted``: as the engine runs it, with time in tables, latents and caption processed once per image, and no
    caption tokens after the last attention. Otherwise as the eager model runs it: everything at every evaluation.
    ``text_rows``: of the caption; default: as many as are read.
    """
    rows = config.decoder.text_length if text_rows is None else text_rows
    count = _Counter(config, batch, itemsize, hoisted, sides or (config.image_size, config.image_size), rows)
    calls = 2 if cfg_scale != 1.0 else 1
    work = [*count.latents(0), *(w for _ in range(calls) for w in count.text(0))] if hoisted else []
    scale = count.height
    for _ in range(steps):
        for _ in range(calls):
            work += [] if hoisted else [*count.latents(scale), *count.text(scale), *count.time(scale)]
            work += count.network(scale)
        work.append(count.pointwise("sde_step", -1, scale, 3 * 3 * count.pixels))
    return [count.pointwise("start_noise", -1, scale, 3 * count.pixels), *work]


class _Counter:
    def __init__(
        self, config: PiDConfig, batch: int, itemsize: int, hoisted: bool, sides: tuple[int, int], text_rows: int
    ) -> None:
        self.config, self.batch, self.itemsize, self.hoisted = config, batch, itemsize, hoisted
        self.height, self.width = sides
        self.pixels, self.rows = self.height * self.width, text_rows
        self.tokens = self.pixels // config.decoder.patch_size**2
        self.d = config.decoder.hidden_size

    def pointwise(self, op: str, layer: int, scale: int, elements: int) -> Work:
        """An op without products that moves so many elements per image."""
        return Work(op, layer, scale, 0, 0, elements * self.batch * self.itemsize)

    def linear(
        self, op: str, layer: int, scale: int, rows: int, cin: int, cout: int, bias: bool = True, taps: int = 1
    ) -> Work:
        """Products of so many rows per image with a matrix; ``taps`` of a convolution."""
        flops, weights = 2 * taps * cin * cout * rows * self.batch, (taps * cin + bias) * cout
        return Work(op, layer, scale, flops, weights * self.itemsize, (cin + cout) * rows * self.batch * self.itemsize)

    def attention(self, op: str, layer: int, scale: int, queries: int, keys: int, width: int) -> Work:
        moved = 2 * (queries + keys) * width * self.batch * self.itemsize
        return Work(op, layer, scale, 4 * queries * keys * width * self.batch, 0, moved)

    def latents(self, scale: int) -> Iterator[Work]:
        """The convolutional network, the features of all injections, and what of their gates depends on them alone."""
        lat, n, g = self.config.features, self.tokens, self.config.features.width
        channels = self.config.latent_channels // lat.unpatchify**2
        yield self.linear("latents.conv", -1, scale, n, channels, g, taps=9)
        yield self.linear("latents.conv", -1, scale, n, g, g, taps=9)
        for i in range(lat.blocks):
            for _ in range(2):
                yield self.pointwise("latents.group_norm", i, scale, 2 * g * n)
                yield self.linear("latents.conv", i, scale, n, g, g, taps=9)
        for _ in range(self.config.injections + lat.pixel_injection):
            yield self.linear("latents.head", -1, scale, n, g, self.d)
            if self.hoisted:
                yield self.linear("latents.gate", -1, scale, n, self.d, self.gate_outputs)

    @property
    def gate_outputs(self) -> int:
        return self.d if self.config.features.gate == "channel" else 1

    def text(self, scale: int) -> Iterator[Work]:
        yield self.linear("text_embed", -1, scale, self.rows, self.config.decoder.text_width, self.d)
        yield self.pointwise("text_norm", -1, scale, 2 * self.rows * self.d)

    def time(self, scale: int) -> Iterator[Work]:
        yield self.linear("time_embed", -1, scale, 1, TIME_WIDTH, self.d)
        yield self.linear("time_embed", -1, scale, 1, self.d, self.d)
        for i in range(self.config.decoder.depth):
            for _ in range(2):
                yield self.linear("adaln", i, scale, 1, self.d, 6 * self.d)

    def network(self, scale: int) -> Iterator[Work]:
        """One evaluation without latents, caption and time."""
        dec, n = self.config.decoder, self.tokens
        yield self.linear("patch_embed", -1, scale, n, 3 * dec.patch_size**2, self.d)
        for i in range(dec.depth):
            if i % self.config.features.interval == 0:
                yield from self.gate(i, scale)
            yield from self.joint(i, scale, is_last=i == dec.depth - 1)
        if self.config.features.pixel_injection:
            yield from self.gate(-1, scale)
        yield self.linear("pixel_embed", -1, scale, self.pixels, 3, dec.pixel_width)
        for j in range(dec.pixel_depth):
            yield from self.pixel(j, scale)
        yield self.pointwise("final_norm", -1, scale, 2 * self.pixels * dec.pixel_width)
        yield self.linear("final", -1, scale, self.pixels, dec.pixel_width, 3)

    def gate(self, layer: int, scale: int) -> Iterator[Work]:
        inputs = self.d if self.hoisted else 2 * self.d
        yield self.linear("gate", layer, scale, self.tokens, inputs, self.gate_outputs)
        yield self.pointwise("sigma_gate", layer, scale, 4 * self.tokens * self.d)

    def joint(self, layer: int, scale: int, is_last: bool) -> Iterator[Work]:
        d, n, t = self.d, self.tokens, self.rows
        dead = is_last and self.hoisted
        yield from self.stream("image", layer, scale, n, kv_only=False)
        yield from self.stream("text", layer, scale, t, kv_only=dead)
        yield self.attention("attention", layer, scale, n if dead else n + t, n + t, d)

    def stream(self, name: str, layer: int, scale: int, rows: int, kv_only: bool) -> Iterator[Work]:
        d, inner = self.d, swiglu_hidden_size(self.d)
        x = rows * d
        yield self.pointwise(f"{name}.norm_modulate", layer, scale, 2 * x)
        yield self.linear(f"{name}.qkv", layer, scale, rows, d, (2 if kv_only else 3) * d, bias=False)
        yield self.pointwise(f"{name}.qk_norm_rope", layer, scale, (2 if kv_only else 4) * x)
        if kv_only:
            return
        yield self.linear(f"{name}.proj", layer, scale, rows, d, d)
        yield self.pointwise(f"{name}.gate_residual_norm_modulate", layer, scale, 4 * x)
        yield self.linear(f"{name}.gate_up", layer, scale, rows, d, 2 * inner, bias=False)
        yield self.pointwise(f"{name}.swiglu", layer, scale, 3 * rows * inner)
        yield self.linear(f"{name}.down", layer, scale, rows, inner, d, bias=False)
        yield self.pointwise(f"{name}.gate_residual", layer, scale, 3 * x)

    def pixel(self, layer: int, scale: int) -> Iterator[Work]:
        dec, n = self.config.decoder, self.tokens
        c, a, values = dec.pixel_width, dec.attention_width, dec.patch_size**2 * dec.pixel_width
        yield self.fused("pixel.modulate", layer, scale, 2, 2 * self.pixels * c)
        yield self.linear("pixel.compress", layer, scale, n, values, a)
        yield self.linear("pixel.qkv", layer, scale, n, a, 3 * a, bias=False)
        yield self.pointwise("pixel.qk_norm_rope", layer, scale, 4 * n * a)
        yield self.attention("pixel.attention", layer, scale, n, n, a)
        yield self.linear("pixel.proj", layer, scale, n, a, a)
        yield self.linear("pixel.expand", layer, scale, n, a, values)
        yield self.fused("pixel.modulate_mlp", layer, scale, 4, 3 * self.pixels * c)
        mlp = self.linear("pixel.mlp", layer, scale, self.pixels, c, 4 * c)
        yield mlp._replace(flops=2 * mlp.flops, weight_bytes=(8 * c * c + 5 * c) * self.itemsize, activation_bytes=0)

    def fused(self, op: str, layer: int, scale: int, vectors: int, elements: int) -> Work:
        """The product that makes ``vectors`` of every pixel's modulations, which the fused op never writes."""
        values = vectors * self.config.decoder.patch_size**2 * self.config.decoder.pixel_width
        product = self.linear(op, layer, scale, self.tokens, self.d, values)
        moved = (self.tokens * self.d + elements) * self.batch * self.itemsize
        return product._replace(activation_bytes=moved)
