"""The decoder's weights as the engine wants them: packed, in one dtype, nothing in it twice."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from msdd_fast.diffusion.rope import RopeTable
from msdd_fast.families.msdd.decoder import Decoder
from msdd_fast.families.msdd.mmdit import ContextKeyValue, CrossBlock, JointBlock, Stream
from msdd_fast.layers.linear.dense import DenseLinear, Linear, MakeLinear


@dataclass(frozen=True)
class StreamWeights:
    """One stream's matrices of one block. The last joint block's context stream has ``qkv`` = [k, v] only."""

    qkv: Linear
    proj: Linear | None
    gate_up: Linear | None
    """[w1 | w3] of the SwiGLU."""
    down: Linear | None


@dataclass(frozen=True)
class BlockWeights:
    """``streams`` is (context, image) or (image,); the qk-norm's weight and bias are (streams, 2, head_dim)."""

    streams: tuple[StreamWeights, ...]
    norm_weight: Tensor
    norm_bias: Tensor


@dataclass(frozen=True)
class ContextWeights:
    """Keys and values of the static context of one cross block: norm of k is (1, 1, head_dim)."""

    kv: Linear
    norm_weight: Tensor
    norm_bias: Tensor


@dataclass(frozen=True)
class Weights:
    """All weights that a decode reads. ``null`` is the embedding (1, L, D) of the null context."""

    patch_embed: Linear
    context_embed: Linear
    context_norm: tuple[Tensor, Tensor] | None
    context_null: Tensor
    context_rope: RopeTable
    blocks: list[BlockWeights]
    contexts: list[ContextWeights]
    final: Linear
    dtype: torch.dtype

    def memory(self) -> int:
        """Bytes of all matrices."""
        linears = [self.patch_embed, self.context_embed, self.final, *(c.kv for c in self.contexts)]
        for block in self.blocks:
            for s in block.streams:
                linears += [w for w in (s.qkv, s.proj, s.gate_up, s.down) if w is not None]
        return sum(w.memory() for w in linears)


@torch.no_grad()
def pack(decoder: Decoder, dtype: torch.dtype, device: torch.device, make: MakeLinear) -> Weights:
    """Pack ``decoder``, which is not changed. ``make`` turns a weight (out, in) and a bias into a Linear.

    The first and last linears, of patches, context and velocity, are always dense: they are small, and what they lose
    goes straight into the pixels.

    The first linear takes patch rows (c, py, px) as the convolution does; the last one's rows are permuted from the
    model's (py, px, c) to the same order, so that state and velocity have one layout.
    """
    config = decoder.config
    p = config.patch_size

    def tensor(x: Tensor) -> Tensor:
        return x.detach().to(device, dtype, copy=True)  # training the tokenizer on does not change an engine

    def linear(*modules: nn.Linear, make: MakeLinear = make) -> Linear:
        weights: list[Tensor] = [m.weight for m in modules]
        biases: list[Tensor] = [m.bias for m in modules if m.bias is not None]
        return make(tensor(torch.cat(weights)), tensor(torch.cat(biases)) if biases else None)

    def stream(s: Stream) -> StreamWeights:
        if s.kv_only:
            return StreamWeights(linear(s.kv), None, None, None)
        return StreamWeights(linear(s.qkv), linear(s.proj), linear(s.mlp.w1, s.mlp.w3), linear(s.mlp.w2))

    def norms(s: Stream, name: str) -> Tensor:
        k = getattr(s.k_norm, name)
        return torch.stack([torch.zeros_like(k) if s.kv_only else getattr(s.q_norm, name), k])

    def block(b: JointBlock | CrossBlock) -> BlockWeights:
        streams = (b.context, b.image) if isinstance(b, JointBlock) else (b.image,)
        norm = [torch.stack([norms(s, name) for s in streams]) for name in ("weight", "bias")]
        return BlockWeights(tuple(stream(s) for s in streams), *(tensor(n) for n in norm))

    def context(c: ContextKeyValue) -> ContextWeights:
        return ContextWeights(linear(c.kv), tensor(c.k_norm.weight[None, None]), tensor(c.k_norm.bias[None, None]))

    def affine(norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
        """Shift and scale (1, D), float32, of a norm with a weight and a bias: LN(x) * (1 + scale) + shift."""
        weight, bias = (p.detach().to(device, torch.float32, copy=True)[None] for p in (norm.weight, norm.bias))
        return bias, weight - 1

    cross = config.decoder.conditioning == "cross"
    final = decoder.final_layer.linear
    order = torch.arange(3 * p * p).view(p, p, 3).permute(2, 0, 1).flatten().to(final.weight.device)
    embed = decoder.patch_embed
    assert embed.bias is not None
    context_rope, _ = decoder.rope_tables(config.grid_size, device)
    return Weights(
        patch_embed=DenseLinear(tensor(embed.weight.flatten(1)), tensor(embed.bias)),
        context_embed=linear(decoder.context_embed, make=DenseLinear),
        context_norm=affine(decoder.context_norm) if cross else None,
        context_null=tensor(decoder.context_null),
        context_rope=context_rope,
        blocks=[block(b) for b in decoder.blocks],  # type: ignore[arg-type]
        contexts=[context(b.context) for b in decoder.blocks] if cross else [],  # type: ignore[arg-type]
        final=DenseLinear(tensor(final.weight[order]), tensor(final.bias[order])),
        dtype=dtype,
    )
