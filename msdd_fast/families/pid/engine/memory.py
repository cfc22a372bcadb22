"""How much memory a PiD decode takes: what is alive at once, by formula, at every place where it may be most.

Counted are the tensors of the engine's decode with fused ops, not what a convolution takes inside.
"""

from __future__ import annotations

from collections.abc import Iterator

from msdd_fast.families.pid.config import PiDConfig, swiglu_hidden_size
from msdd_fast.layers.request import WHOLE, Request
from msdd_fast.layers.tiles import largest_tile

CHUNK_BYTES = 2**28
"""What the rows of a pixel block that run at once may take."""
MIN_ROWS = 16


def bytes_per_row(config: PiDConfig, itemsize: int) -> int:
    """Bound on what one row (the pixels of one patch) of a pixel block takes in plain PyTorch, the most that it may.

    Alive at once: four modulations, the pixels, their norm and the result, and the MLP's hidden layer twice.
    """
    dec = config.decoder
    return dec.patch_size**2 * dec.pixel_width * (4 + 5 + 8) * max(itemsize, 4)


def chunk_rows(config: PiDConfig, itemsize: int) -> int:
    """Rows that take at most CHUNK_BYTES, at least MIN_ROWS."""
    return max(MIN_ROWS, CHUNK_BYTES // bytes_per_row(config, itemsize))


def activation_bytes(config: PiDConfig, request: Request, itemsize: int, chunk: int, swiglu: int) -> int:
    """Most bytes that a decode holds at once, its images included.

    Args:
        itemsize: of the engine's dtype.
        chunk: most rows of a pixel block that run at once.
        swiglu: bytes of a row that a SwiGLU holds besides its result.
    """
    assert request.size is not None
    batch, patch, way = request.shape[0], config.decoder.patch_size, request.way
    grid = (request.size[0] // patch, request.size[1] // patch)
    text = request.conditions[0][0][0] if request.conditions else config.decoder.text_length
    parts = 0 if way == WHOLE else way.parts
    decode = _Decode(config, grid, batch, text, itemsize, parts, chunk, swiglu)
    state, context = decode.state, decode.context()
    if config.sampler == "dpm":  # the estimates of this step and of the one before; at the end of a step all of them
        kept, step = state * (2 if request.guided else 1), 6 * state
        context += text * batch * config.decoder.hidden_size * itemsize if request.guided else 0
    else:
        kept, step = 0, state + decode.velocity
    if way.tile:
        tile = _Decode(config, largest_tile(grid, way.tile // patch), batch, text, itemsize, parts, chunk, swiglu)
        step = 6 * state if config.sampler == "dpm" else 2 * state
        network = state + tile.context() + tile.state + max(tile.places(), tile.velocity + 2 * tile.state)
    else:
        network = decode.places()
    return max(decode.latents(), decode.injections(), state + context + max(kept + network, step))


class _Decode:
    """What an image of a ``grid`` of patches takes, or a tile of one; ``parts`` 0 for ``PiDNetwork`` itself."""

    def __init__(
        self,
        config: PiDConfig,
        grid: tuple[int, int],
        batch: int,
        text: int,
        itemsize: int,
        parts: int,
        chunk: int,
        swiglu: int,
    ) -> None:
        dec = config.decoder
        self.config, self.itemsize, self.parts, self.swiglu = config, itemsize, parts, swiglu
        self.tokens, self.text = grid[0] * grid[1], text
        self.rows, self.captions = self.tokens * batch, text * batch
        pixels = dec.patch_size**2
        self.width, self.pixels = dec.hidden_size * itemsize, pixels * dec.pixel_width * itemsize  # of one row
        self.attention = dec.attention_width * itemsize
        self.state, self.velocity = 3 * 4 * pixels * self.rows, 3 * pixels * itemsize * self.rows
        self.chunk = min(self.rows, chunk)
        count = max(1, min(parts, self.tokens // MIN_ROWS))
        self.part = min(self.chunk, -(-self.tokens // count) * batch) if parts else self.rows

    @property
    def gate(self) -> int:
        """Elements of a gate's logit."""
        return self.config.decoder.hidden_size if self.config.features.gate == "channel" else 1

    def latents(self) -> int:
        """The convolutional network of latents."""
        lat = self.config.features
        maps = (4 if lat.blocks else 3) + (lat.padding == "replicate")
        return self.rows * (maps * lat.width + self.config.latent_channels // lat.unpatchify**2) * self.itemsize

    def injections(self) -> int:
        """The last injection, with all others kept; before there is a state."""
        if self.parts:
            return 0
        wide = self.gate * (self.itemsize + (4 if self.itemsize < 4 else 0))
        return self.context() + self.rows * (self.config.features.width * self.itemsize + wide)

    def context(self) -> int:
        """What is kept through all steps."""
        dec, lat = self.config.decoder, self.config.features
        half = dec.hidden_size // dec.heads // 2, dec.attention_width // dec.attention_heads // 2
        ropes = 2 * 4 * (self.tokens * (half[0] + half[1]) + (self.text + self.tokens) * half[0])
        if self.parts:
            kept = lat.width * self.itemsize
        else:
            kept = (self.config.injections + lat.pixel_injection) * (self.width + 4 * self.gate)
        return self.rows * kept + ropes + self.captions * self.width

    def places(self) -> int:
        """What an evaluation of the network adds, its result included."""
        narrow = self.velocity if self.itemsize < 4 else 0  # the state in the engine's dtype
        return narrow + max(self._joint() if self.parts else self._whole_joint(), *self._pixels())

    def _swiglu(self) -> int:
        inner = swiglu_hidden_size(self.config.decoder.hidden_size) * self.itemsize
        return inner + max(self.swiglu, self.width)

    def _whole_joint(self) -> int:
        both, width = self.rows + self.captions, self.width
        captions = 2 * self.captions * width
        attention = (2 * self.rows + 6 * both) * width
        update = (5 * self.rows + both) * width + self.rows * max(self._swiglu(), 2 * width)
        gate = self.rows * (4 * width + self.gate * self.itemsize)
        return captions + max(attention, update, gate, self.velocity + self.rows * width)

    def _joint(self) -> int:
        """In parts: tokens, their norm, one buffer of q, k and v, and what a part of the rows takes."""
        width = self.width
        kept = (2 * self.rows + 3 * (self.rows + self.captions) + 2 * self.captions) * width
        update = 4 * width + max(self._swiglu(), 2 * width)
        gate = self.gate * (2 * self.itemsize + 8) + 3 * width
        texts = self.captions * (5 * width + self._swiglu())
        return max(kept + self.part * max(update, gate, 3 * width), kept + texts, self.velocity + self.rows * width)

    def _pixels(self) -> Iterator[int]:
        kept = self.rows * (self.width + self.pixels)
        narrow = self.velocity // self.rows
        yield kept + self.velocity
        if self.parts:
            yield kept + 3 * self.rows * self.attention + self.part * (2 * self.attention + 2 * self.pixels)
            yield kept + self.velocity + self.part * (self.pixels + narrow)
        else:
            yield kept + 7 * self.rows * self.attention
            yield kept + self.rows * self.attention + 2 * self.chunk * self.pixels
            yield kept + self.velocity + self.chunk * (self.pixels + narrow)
