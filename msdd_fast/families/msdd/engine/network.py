"""The velocity network over packed weights and token-major activations (T, B, D).

Context tokens first, then image tokens: each stream's rows are one slice, and keys and values of both streams one
buffer, so nothing is concatenated, split or copied, at any batch size. Same arithmetic as models/decoder.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from msdd_fast import profiling
from msdd_fast.diffusion.rope import RopeTable
from msdd_fast.families.msdd.config import DecoderConfig
from msdd_fast.families.msdd.engine.tables import BlockModulation, Modulation
from msdd_fast.families.msdd.engine.weights import BlockWeights, Weights
from msdd_fast.layers.linear.base import Linear
from msdd_fast.ops import Ops


class Context(NamedTuple):
    """What depends on z alone, computed once per image: embedded tokens (L, B, D), or keys and values per block."""

    tokens: Tensor | None
    keys_values: list[tuple[Tensor, Tensor]]


class Network:
    """Embeds the context and evaluates the velocity. ``ops`` are those of ``bound_ops.bind``."""

    def __init__(self, weights: Weights, config: DecoderConfig, ops: Ops) -> None:
        self.w, self.head_dim, self.ops = weights, config.head_dim, ops
        minus_one = torch.tensor(-1.0, dtype=torch.float32, device=weights.context_null.device)
        self.minus_one = None if config.prediction == "velocity" else minus_one

    def context(self, z: Tensor, guided: bool) -> Context:
        """Context of latents z (B, L, C); ``guided`` appends the null context of B more images."""
        if guided:
            z = torch.cat([z, self.w.context_null.expand(len(z), -1, -1)])
        b, length, _ = z.shape
        rows = z.to(self.w.dtype).transpose(0, 1).reshape(length * b, -1)
        rows = self.w.context_embed(rows)
        if not self.w.contexts:
            return Context(rows.view(length, b, -1), [])
        norm = self.w.context_norm
        assert norm is not None
        rows = self.ops.norm_modulate(rows, norm.zeros, norm.zeros, None, norm.eps, norm.ones)
        keys_values = []
        for c in self.w.contexts:
            kv = c.kv(rows).view(length, b, 2, -1, self.head_dim).transpose(0, 1)
            k = self.ops.qk_norm_rope(kv, c.norm_weight, c.norm_bias, *self.w.context_rope)
            keys_values.append((k[:, :, 0], kv[:, :, 1]))
        return Context(None, keys_values)

    def velocity(self, patches: Tensor, context: Context, m: Modulation, rope: RopeTable) -> Tensor:
        """Velocity divided by the step's ``gain``, (N, B', F), of patch rows (N, B, F).

        B' = 2B with a guided context: conditional images first.
        """
        out = self._output(patches, context, m, rope)
        if self.minus_one is None:
            return out
        return self.ops.euler_step(_for_each_branch(patches, out.shape[1]), out, self.minus_one)

    def _output(self, patches: Tensor, context: Context, m: Modulation, rope: RopeTable) -> Tensor:
        """The network's output for ``velocity``."""
        embedded = self.w.patch_embed(patches.flatten(0, 1)).view(*patches.shape[:2], -1)
        if context.tokens is None:
            batch = context.keys_values[0][0].shape[0]
            return self._blocks(_for_each_branch(embedded, batch), 0, context, m, rope)
        length, batch, width = context.tokens.shape
        x = embedded.new_empty(length + len(patches), batch, width)
        x[:length] = context.tokens
        x[length:].unflatten(1, (-1, patches.shape[1])).copy_(embedded[:, None])
        return self._blocks(x, length, context, m, rope)

    def _blocks(self, x: Tensor, length: int, context: Context, m: Modulation, rope: RopeTable) -> Tensor:
        """Blocks and final layer over x (T, B, D), whose first ``length`` tokens are the context stream."""
        batch = x.shape[1]
        x = x.flatten(0, 1)
        split = length * batch if length else None
        h = self.ops.norm_modulate(x, m.blocks[0].shift_msa, m.blocks[0].scale_msa, split)
        layers = profiling.ranges(zip(self.w.blocks, m.blocks, strict=True), lambda i: f"layer {i}")
        for i, (block, mod) in enumerate(layers):
            last = i == len(self.w.blocks) - 1
            a = self._attention(block, h, length, batch, context.keys_values[i] if not length else None, rope)
            if last and split:  # nothing reads the context stream any more
                x, split = x[split:], None
            streams = block.streams[-1:] if split is None else block.streams
            y = _per_stream([s.proj for s in streams], a, split)
            x, h = self.ops.gate_residual_norm_modulate(x, y, mod.gate_msa, mod.shift_mlp, mod.scale_mlp, split)
            hidden = _per_stream([s.gate_up for s in streams], h, split)
            y = _per_stream([s.down for s in streams], hidden, split)
            shift, scale = (m.shift, m.scale) if last else _first_norm(m.blocks[i + 1])
            x, h = self.ops.gate_residual_norm_modulate(x, y, mod.gate_mlp, shift, scale, split)
        return self.w.final(h).view(-1, batch, self.w.final.out_features)

    def _attention(
        self,
        block: BlockWeights,
        h: Tensor,
        length: int,
        batch: int,
        context_kv: tuple[Tensor, Tensor] | None,
        rope: RopeTable,
    ) -> Tensor:
        """Attention rows (T*B, D) of normalised rows h; image rows only where the context has no queries."""
        width = block.streams[-1].qkv.out_features  # 3D
        split = length * batch
        qkv = h.new_empty(len(h), width)
        if length:
            first = block.streams[0].qkv
            if first.out_features != width:  # keys and values only: the queries' place is never read
                qkv[:split, : width // 3].zero_()
            first(h[:split], out=qkv[:split, width - first.out_features :])
        block.streams[-1].qkv(h[split:], out=qkv[split:])
        heads = qkv.view(-1, batch, 3, width // (3 * self.head_dim), self.head_dim).transpose(0, 1)
        qk = self.ops.qk_norm_rope(heads, block.norm_weight, block.norm_bias, *rope, length or None)
        q, k, v = qk[:, :, 0], qk[:, :, 1], heads[:, :, 2]
        if length and block.streams[0].proj is None:
            q = q[:, length:]
        out = self.ops.attention(q, k, v)
        if context_kv is not None:
            out = self.ops.context_attention(q, *context_kv, out)
        return out.transpose(0, 1).reshape(-1, width // 3)


def _for_each_branch(rows: Tensor, batch: int) -> Tensor:
    """Rows (N, B, F) once for each branch of the guidance: (N, batch, F)."""
    return rows if batch == rows.shape[1] else rows.repeat(1, batch // rows.shape[1], 1)


def _first_norm(mod: BlockModulation) -> tuple[Tensor, Tensor]:
    return mod.shift_msa, mod.scale_msa


def _per_stream(linears: list[Linear | None], x: Tensor, split: int | None) -> Tensor:
    """Each stream's rows through its own matrix, into one buffer."""
    image = linears[-1]
    assert image is not None
    if split is None:
        return image(x)
    context = linears[0]
    assert context is not None
    out = x.new_empty(len(x), image.out_features)
    context(x[:split], out=out[:split])
    image(x[split:], out=out[split:])
    return out
