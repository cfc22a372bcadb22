"""PiD's velocity with its rows in parts, for one image or for tiles of it: the same numbers up to rounding.

The latents' features are computed again wherever they enter the tokens, so that only their convolutional tokens are
kept. Tokens, their norm and one buffer of q, k and v exist whole, and later the pixels; everything else exists for one
part of the rows at a time.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from msdd_fast import profiling
from msdd_fast.families.pid.blocks import NORM_EPS
from msdd_fast.families.pid.engine.network import Context, Injection, PiDNetwork, Text
from msdd_fast.families.pid.engine.tables import PiDStep
from msdd_fast.families.pid.engine.weights import GateWeights, JointWeights, PixelWeights
from msdd_fast.layers.tiles import Tile, tiles

MIN_ROWS = 16


class PiDParts(PiDNetwork):
    """``network``, over the same weights, in ``parts`` parts of the rows, or in tiles of ``tile`` patches a side."""

    def __init__(self, network: PiDNetwork, parts: int, tile: int = 0) -> None:
        super().__init__(network.w, network.config, network.ops)
        self.parts, self.tile, self.chunk = parts, tile, network.chunk

    def velocity(self, x: Tensor, context: Context, text: Text, step: PiDStep) -> Tensor:
        """As ``PiDNetwork.velocity``; that of tiles is blended, in float32."""
        if not self.tile:
            return super().velocity(x, context, text, step)
        (high, wide), p, batch = context.grid, self.patch, len(x)
        v = x.new_zeros(high, wide, batch, p, p, 3)
        for tile in tiles(context.grid, self.tile, p, x.device):
            mine, caption = self._of_tile(context, text, tile)
            part = super().velocity(x[:, :, tile.high, tile.wide].contiguous(), mine, caption, step)
            weighted = part.view(*mine.grid, batch, p, p, 3) * tile.down.view(-1, 1, 1, p, 1, 1)
            v[tile.rows, tile.columns] += weighted.mul_(tile.across.view(-1, 1, 1, p, 1))
            del mine, caption, part, weighted
        return v.view(-1, batch, p * p, 3)

    def _of_tile(self, context: Context, text: Text, tile: Tile) -> tuple[Context, Text]:
        """What a tile sees of them: its patches keep their places in the whole image."""
        high, wide = context.grid

        def of_tile(x: Tensor) -> Tensor:
            grid = x.view(high, wide, -1, x.shape[-1])
            return grid[tile.rows, tile.columns].reshape(-1, x.shape[-1])

        ropes = [tuple(of_tile(t) for t in pair) for pair in (context.image_rope, context.pixel_rope)]
        (cos, sin), pixel_rope = ropes
        mine = Context(
            (tile.rows.stop - tile.rows.start, tile.columns.stop - tile.columns.start),
            [],
            None,
            (cos, sin),
            (pixel_rope[0], pixel_rope[1]),
            context.column[tile.wide],
            context.row[tile.high],
            None if context.tokens is None else of_tile(context.tokens),
            context.sigma,
        )
        tables = (torch.cat([t[: text.length], own]) for t, own in ((text.cos, cos), (text.sin, sin)))
        return mine, Text(text.tokens, text.length, *tables)

    def _with_injections(self, context: Context, tokens: Tensor, sigma: Tensor) -> Context:
        """Without: they are computed where they are used."""
        return context._replace(tokens=tokens, sigma=sigma)

    def _tokens(self, x: Tensor, context: Context, text: Text, step: PiDStep) -> Tensor:
        ops, blocks, batch = self.ops, self.w.joint, len(x)
        s, y, interval = self._embed_patches(x, context), text.tokens, self.config.features.interval
        g = ops.norm_modulate(y, step.text[0].shift1, step.text[0].scale1, None, NORM_EPS, blocks[0].text.norm1)
        h = torch.empty_like(s)
        for i, block in enumerate(profiling.ranges(blocks, lambda i: f"layer {i}")):
            vectors, following = step.image[i], i + 1 < len(blocks)
            if i % interval == 0:
                gate = self.w.gates[i // interval]
                for part in self._parts(len(s), batch):
                    injection = self._part_of_injection(gate, context, part)
                    s[part], h[part] = self._gate(s[part], gate, injection, block, vectors)
            heads = self._queries_keys_values(block, h, g, text, batch)
            if block.text.proj is not None:
                caption = self._attend(heads, slice(0, text.length))
            normed = following and (i + 1) % interval != 0
            for part in self._parts(len(s), batch):
                tokens = slice(text.length + part.start // batch, text.length + part.stop // batch)
                image = self._attend(heads, tokens)
                s[part], h[part] = self._update(block.image, s[part], image, vectors, step.image, i, normed)
            if block.text.proj is not None:
                y, g = self._update(block.text, y, caption, step.text[i], step.text, i, following)
            del heads
        embedding = step.embedding.to(s.dtype)
        for part in self._parts(len(s), batch):
            s[part] = F.silu(s[part] + embedding)
            if self.w.pixel_gate is not None:
                injection = self._part_of_injection(self.w.pixel_gate, context, part)
                s[part], _ = self._gate(s[part], self.w.pixel_gate, injection)
        return s

    def _part_of_injection(self, gate: GateWeights, context: Context, part: slice) -> Injection:
        assert context.tokens is not None and context.sigma is not None
        return self._injection(gate, context.tokens[part], context.sigma)

    def _queries_keys_values(self, block: JointWeights, h: Tensor, g: Tensor, text: Text, batch: int) -> Tensor:
        """(B, T + N, 3, heads, d) with q and k normalised and rotated."""
        width, cut = self.width, len(g)
        qkv = h.new_empty(cut + len(h), 3 * width)
        if block.text.proj is None:
            qkv[:cut, :width].zero_()  # the queries' place, which is never read
            block.text.qkv(g, out=qkv[:cut, width:])
        else:
            block.text.qkv(g, out=qkv[:cut])
        heads = qkv.view(-1, batch, 3, width // self.head_dim, self.head_dim).transpose(0, 1)
        self._rotate(heads, slice(0, text.length), block.qk_norm[:1], text.cos, text.sin)
        for part in self._parts(len(h), batch):
            block.image.qkv(h[part], out=qkv[cut:][part])
            tokens = slice((cut + part.start) // batch, (cut + part.stop) // batch)
            self._rotate(heads, tokens, block.qk_norm[1:], text.cos, text.sin)
        return heads

    def _rotate(self, heads: Tensor, tokens: slice, norm: Tensor, cos: Tensor, sin: Tensor) -> None:
        """Normalise and rotate q and k of some tokens in their place."""
        heads[:, tokens, :2] = self.ops.qk_norm_rope(heads[:, tokens], norm, None, cos[tokens], sin[tokens])

    def _attend(self, heads: Tensor, tokens: slice) -> Tensor:
        """Attention rows of some tokens to all."""
        q, k, v = heads.unbind(2)
        out: Tensor = self.ops.attention(q[:, tokens], k, v)
        return out.transpose(0, 1).flatten(2).flatten(0, 1)

    def _pixel_block(self, w: PixelWeights, p: Tensor, s: Tensor, context: Context, batch: int) -> None:
        ops, width, d = self.ops, w.compress.out_features, self.pixel_head_dim
        qkv, m = s.new_empty(len(s), 3 * width), w.first
        heads = qkv.view(-1, batch, 3, width // d, d).transpose(0, 1)
        for part in self._parts(len(s), batch):
            h = ops.pixel_modulate(p[part], s[part], m.weight, m.bias, m.norm, m.packed).flatten(1)
            w.qkv(w.compress(h), out=qkv[part])
            del h
            self._rotate(heads, slice(part.start // batch, part.stop // batch), w.qk_norm, *context.pixel_rope)
        m = w.second
        for part in self._parts(len(s), batch):
            a = w.proj(self._attend(heads, slice(part.start // batch, part.stop // batch)))
            y = w.expand(a).view_as(p[part])
            p[part] = ops.pixel_block(p[part], y, s[part], m.weight, m.bias, m.norm, *w.mlp, m.packed)
            del a, y

    def _parts(self, count: int, batch: int = 1) -> Iterator[slice]:
        """Rows of whole tokens: ``parts`` parts, of at least MIN_ROWS tokens and at most ``chunk`` rows."""
        tokens = count // batch
        parts = max(min(self.parts, tokens // MIN_ROWS), -(-count // self.chunk), 1)
        for i in range(parts):
            yield slice(tokens * i // parts * batch, tokens * (i + 1) // parts * batch)
