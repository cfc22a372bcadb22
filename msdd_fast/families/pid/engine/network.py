"""PiD's velocity network over packed weights and token-major rows (tokens * B). Same arithmetic as decoder.py.

What depends on the latents, the caption or the size alone is computed once per decode (``context``, ``embed_text``).
Caption and image are streams of their own; their q, k and v lie in one buffer, the caption's rows first, so that
nothing is concatenated. The pixel blocks take their rows in chunks: their modulations never exist whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from msdd_fast import profiling
from msdd_fast.families.pid.blocks import NORM_EPS
from msdd_fast.families.pid.config import PiDConfig
from msdd_fast.families.pid.decoder import GROUPS, pixel_positions
from msdd_fast.families.pid.engine.memory import chunk_rows
from msdd_fast.families.pid.engine.tables import PiDStep, Vectors
from msdd_fast.families.pid.engine.weights import GateWeights, JointWeights, PiDWeights, PixelWeights, StreamWeights
from msdd_fast.families.pid.rope import image_rope, text_rope
from msdd_fast.layers.convolution import channels_last, rows
from msdd_fast.ops import Ops

GROUP_NORM_EPS = 1e-5


class Injection(NamedTuple):
    """Features of the latents (N*B, D), and all of their gate's logit that does not depend on the tokens, float32."""

    features: Tensor
    offset: Tensor


class Context(NamedTuple):
    """What depends on latents and size alone.

    Attributes:
        grid: rows and columns of patches.
        injections: one for every ``interval`` joint blocks.
        pixel_injection: the one before the pixel blocks.
        image_rope, pixel_rope: cos and sin of the patches, float32 (N, head_dim / 2), for both kinds of heads.
        column, row: positions of pixels, (W, C / 2) and (H, C / 2).
        tokens, sigma: what injections are computed of, (N*B, G) and (B,), where they are not kept (``parts``).
    """

    grid: tuple[int, int]
    injections: list[Injection]
    pixel_injection: Injection | None
    image_rope: tuple[Tensor, Tensor]
    pixel_rope: tuple[Tensor, Tensor]
    column: Tensor
    row: Tensor
    tokens: Tensor | None = None
    sigma: Tensor | None = None


class Text(NamedTuple):
    """A caption's tokens (T*B, D), their number T, and the joint rotary tables (T + N, head_dim / 2)."""

    tokens: Tensor
    length: int
    cos: Tensor
    sin: Tensor


class PiDNetwork:
    """Computes what is constant in a decode and evaluates the velocity. ``ops`` are those of ``bound_ops.bind``.

    Attributes:
        chunk: most rows of a pixel block at a time.
    """

    def __init__(self, weights: PiDWeights, config: PiDConfig, ops: Ops) -> None:
        self.w, self.config, self.ops = weights, config, ops
        self.chunk = chunk_rows(config, weights.dtype.itemsize)
        dec = config.decoder
        self.patch, self.width, self.channels = dec.patch_size, dec.hidden_size, dec.pixel_width
        self.head_dim = dec.hidden_size // dec.heads
        self.pixel_head_dim = dec.attention_width // dec.attention_heads
        device = weights.final_norm.device
        self._zeros = {n: torch.zeros(1, n, device=device) for n in (self.width, self.channels)}

    # --- Once per decode. ---

    def context(self, z: Tensor, sigma: Tensor, size: tuple[int, int]) -> Context:
        """Of latents (B, Z, h, w) with noise levels (B,), for images of a size (H, W)."""
        dec, device = self.config.decoder, z.device
        grid = (size[0] // self.patch, size[1] // self.patch)
        tokens = self._latent_tokens(z, grid)
        ropes = [image_rope(dec, grid, d, device) for d in (self.head_dim, self.pixel_head_dim)]
        (cos, sin), (pixel_cos, pixel_sin) = ropes
        assert sin is not None and pixel_sin is not None
        height, width = (pixel_positions(n, self.channels // 2, device).to(self.w.dtype) for n in size)
        context = Context(grid, [], None, (cos, sin), (pixel_cos, pixel_sin), width, height)
        return self._with_injections(context, tokens, sigma)

    def _with_injections(self, context: Context, tokens: Tensor, sigma: Tensor) -> Context:
        pixel = None if self.w.pixel_gate is None else self._injection(self.w.pixel_gate, tokens, sigma)
        return context._replace(
            injections=[self._injection(g, tokens, sigma) for g in self.w.gates], pixel_injection=pixel
        )

    def embed_text(self, text: Tensor, context: Context) -> Text:
        """Of caption features (B, T, text_width)."""
        batch, length, _ = text.shape
        rows = self.w.text(text.to(self.w.dtype).transpose(0, 1).reshape(length * batch, -1))
        zeros = self._zeros[self.width]
        rows = self.ops.norm_modulate(rows, zeros, zeros, None, NORM_EPS, self.w.text_norm)
        rows = (rows.view(length, batch, -1) + self.w.text_position[:length, None]).flatten(0, 1)
        table = text_rope(length, self.head_dim, text.device)
        assert table.sin is not None
        cos, sin = context.image_rope
        return Text(rows, length, torch.cat([table.cos, cos]), torch.cat([table.sin, sin]))

    def _latent_tokens(self, z: Tensor, grid: tuple[int, int]) -> Tensor:
        """(N*B, G), token-major."""
        w = self.w.latents
        z = F.interpolate(F.pixel_shuffle(z.to(self.w.dtype), self.config.features.unpatchify), grid, mode="nearest")
        h = w.second(F.silu(w.first(channels_last(z))))
        for norm1, conv1, norm2, conv2 in w.blocks:
            y = conv1(self.ops.group_norm_modulate_silu(h, GROUPS, GROUP_NORM_EPS, *norm1))
            h = h + conv2(self.ops.group_norm_modulate_silu(y, GROUPS, GROUP_NORM_EPS, *norm2))
        batch = len(z)
        tokens = rows(channels_last(h))
        return tokens if batch == 1 else tokens.unflatten(0, (batch, -1)).transpose(0, 1).flatten(0, 1)

    def _injection(self, gate: GateWeights, tokens: Tensor, sigma: Tensor) -> Injection:
        features = gate.head(tokens)
        closing = (gate.alpha * sigma).expand(len(tokens) // len(sigma), -1).reshape(-1, 1)
        return Injection(features, gate.features(features).float() - closing)

    # --- At every step. ---

    def velocity(self, x: Tensor, context: Context, text: Text, step: PiDStep) -> Tensor:
        """Velocity of states x (B, 3, H, W) as pixels of patches, (N, B, P^2, 3)."""
        x = x.to(self.w.dtype)
        s = self._tokens(x, context, text, step)
        return self._pixels(x, s, context)

    def _tokens(self, x: Tensor, context: Context, text: Text, step: PiDStep) -> Tensor:
        """Image tokens (N*B, D) that condition the pixel blocks."""
        ops, batch, blocks = self.ops, len(x), self.w.joint
        s, y, interval = self._embed_patches(x, context), text.tokens, self.config.features.interval
        g = ops.norm_modulate(y, step.text[0].shift1, step.text[0].scale1, None, NORM_EPS, blocks[0].text.norm1)
        for i, block in enumerate(profiling.ranges(blocks, lambda i: f"layer {i}")):
            vectors = step.image[i]
            if i % interval == 0:
                s, h = self._gate(s, self.w.gates[i // interval], context.injections[i // interval], block, vectors)
            image, caption = self._attention(block, h, g, text, batch)
            following = i + 1 < len(blocks)
            injects = following and (i + 1) % interval == 0
            s, h = self._update(block.image, s, image, vectors, step.image, i, following and not injects)
            if caption is not None:
                y, g = self._update(block.text, y, caption, step.text[i], step.text, i, following)
        s = F.silu(s + step.embedding.to(s.dtype))
        if context.pixel_injection is not None:
            assert self.w.pixel_gate is not None
            s, _ = self._gate(s, self.w.pixel_gate, context.pixel_injection)
        return s

    def _embed_patches(self, x: Tensor, context: Context) -> Tensor:
        """Patches of states as tokens (N*B, D)."""
        (high, wide), p = context.grid, self.patch
        patches = x.view(len(x), 3, high, p, wide, p).permute(2, 4, 0, 1, 3, 5).reshape(high * wide * len(x), -1)
        return self.w.patch(patches)

    def _gate(
        self,
        s: Tensor,
        gate: GateWeights,
        injection: Injection,
        block: JointWeights | None = None,
        vectors: Vectors | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Tokens with the latents' features, and what the norm before ``block`` makes of them."""
        logit, weight = (None, gate.tokens) if isinstance(gate.tokens, Tensor) else (gate.tokens(s), None)
        shift = scale = norm = None
        if block is not None and vectors is not None:
            shift, scale, norm = vectors.shift1, vectors.scale1, block.image.norm1
        return self.ops.sigma_gate(s, injection.features, injection.offset, shift, scale, norm, logit, weight)

    def _attention(
        self, block: JointWeights, h: Tensor, g: Tensor, text: Text, batch: int
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of normalised image rows h and caption rows g, whose result is None where nobody reads it."""
        width, cut = self.width, len(g)
        qkv = h.new_empty(cut + len(h), 3 * width)
        is_last = block.text.proj is None
        if is_last:
            qkv[:cut, :width].zero_()  # the queries' place, which is never read
            block.text.qkv(g, out=qkv[:cut, width:])
        else:
            block.text.qkv(g, out=qkv[:cut])
        block.image.qkv(h, out=qkv[cut:])
        heads = qkv.view(-1, batch, 3, width // self.head_dim, self.head_dim).transpose(0, 1)
        qk = self.ops.qk_norm_rope(heads, block.qk_norm, None, text.cos, text.sin, text.length)
        q, k, v = qk[:, :, 0], qk[:, :, 1], heads[:, :, 2]
        out = self.ops.attention(q[:, text.length :] if is_last else q, k, v).transpose(0, 1).reshape(-1, width)
        return (out, None) if is_last else (out[cut:], out[:cut])

    def _update(
        self,
        w: StreamWeights,
        x: Tensor,
        attended: Tensor,
        vectors: Vectors,
        all_vectors: list[Vectors],
        i: int,
        norm: bool,
    ) -> tuple[Tensor, Tensor]:
        """The stream after block i, and with ``norm`` what the next block's norm makes of it."""
        assert w.proj is not None and w.gate_up is not None and w.down is not None and w.norm2 is not None
        ops, y = self.ops, w.proj(attended)
        x, h = ops.gate_residual_norm_modulate(
            x, y, vectors.gate1, vectors.shift2, vectors.scale2, None, NORM_EPS, w.norm2
        )
        y = w.down(w.gate_up(h))
        if not norm:
            return torch.addcmul(x, vectors.gate2.to(x.dtype), y), h
        after = self.w.joint[i + 1]
        stream = after.image if w is self.w.joint[i].image else after.text
        following = all_vectors[i + 1]
        found: tuple[Tensor, Tensor] = ops.gate_residual_norm_modulate(
            x, y, vectors.gate2, following.shift1, following.scale1, None, NORM_EPS, stream.norm1
        )
        return found

    def _pixels(self, x: Tensor, s: Tensor, context: Context) -> Tensor:
        batch, count = len(x), len(s)
        p = self._embed_pixels(x, context)
        for block in profiling.ranges(self.w.pixels, lambda i: f"pixel layer {i}"):
            self._pixel_block(block, p, s, context, batch)
        v = p.new_empty(count, self.patch**2, 3)
        zeros = self._zeros[self.channels]
        for part in self._parts(count):
            h = self.ops.norm_modulate(p[part].flatten(0, 1), zeros, zeros, None, NORM_EPS, self.w.final_norm)
            v[part] = self.w.final(h).view(-1, self.patch**2, 3)
        return v.view(-1, batch, self.patch**2, 3)

    def _embed_pixels(self, x: Tensor, context: Context) -> Tensor:
        """Pixels (N*B, P^2, C) with their positions."""
        (high, wide), p, half = context.grid, self.patch, self.channels // 2
        pixels = x.view(len(x), 3, high, p, wide, p).permute(2, 4, 0, 3, 5, 1).reshape(-1, 3)
        out = self.w.pixel(pixels)
        grid = out.view(high, wide, len(x), p, p, self.channels)
        grid[..., :half] += context.column.view(1, wide, 1, 1, p, half)
        grid[..., half:] += context.row.view(high, 1, 1, p, 1, half)
        return out.view(-1, p * p, self.channels)

    def _pixel_block(self, w: PixelWeights, p: Tensor, s: Tensor, context: Context, batch: int) -> None:
        """Replaces the pixels p (N*B, P^2, C)."""
        ops, count = self.ops, len(s)
        a = s.new_empty(count, w.compress.out_features)
        m = w.first
        for part in self._parts(count):
            modulated = ops.pixel_modulate(p[part], s[part], m.weight, m.bias, m.norm, m.packed).flatten(1)
            w.compress(modulated, out=a[part])
            del modulated
        qkv = w.qkv(a).view(-1, batch, 3, a.shape[1] // self.pixel_head_dim, self.pixel_head_dim).transpose(0, 1)
        qk = ops.qk_norm_rope(qkv, w.qk_norm, None, *context.pixel_rope)
        a = ops.attention(qk[:, :, 0], qk[:, :, 1], qkv[:, :, 2]).transpose(0, 1).reshape(count, -1)
        del qkv, qk
        a, m = w.proj(a), w.second
        for part in self._parts(count):
            y = w.expand(a[part]).view_as(p[part])
            p[part] = ops.pixel_block(p[part], y, s[part], m.weight, m.bias, m.norm, *w.mlp, m.packed)
            del y

    def _parts(self, count: int) -> Iterator[slice]:
        """``count`` rows in as few chunks of at most ``chunk`` as possible, as even as possible."""
        parts = -(-count // self.chunk)
        for i in range(parts):
            yield slice(count * i // parts, count * (i + 1) // parts)
