"""The decoder's weights as the engine wants them: packed, in one dtype, nothing in it twice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from msdd_fast.diffusion.rope import RopeTable
from msdd_fast.families.msdd.decoder import Decoder
from msdd_fast.families.msdd.engine.context import fold_context
from msdd_fast.families.msdd.mmdit import CrossBlock, JointBlock, Stream
from msdd_fast.layers.linear.base import Linear, MakeLinear, Swiglu
from msdd_fast.layers.packer import Packer


@dataclass(frozen=True)
class StreamWeights:
    """One stream's matrices of one block. The last joint block's context stream has ``qkv`` = [k, v] only."""

    qkv: Linear
    proj: Linear | None
    gate_up: Linear | None
    """w1 and w3 with the SwiGLU."""
    down: Linear | None


@dataclass(frozen=True)
class BlockWeights:
    """``streams`` is (context, image) or (image,); the qk-norm's weight and bias are (streams, 2, head_dim)."""

    streams: tuple[StreamWeights, ...]
    norm_weight: Tensor
    norm_bias: Tensor


@dataclass(frozen=True)
class ContextNorm:
    """The RMSNorm of folded context tokens, as ``norm_modulate`` takes it: neither shifted nor scaled."""

    zeros: Tensor
    ones: Tensor
    eps: float


@dataclass(frozen=True)
class ContextWeights:
    """Keys and values of the static context of one cross block, folded: norm of k is (1, 1, head_dim)."""

    kv: Linear
    norm_weight: Tensor
    norm_bias: Tensor


@dataclass(frozen=True)
class Weights:
    """All weights that a decode reads. ``context_null`` are the latents (1, L, C) of the null context.

    With cross blocks (``contexts``) the context is folded: engine/context.py.
    """

    patch_embed: Linear
    context_embed: Linear
    context_norm: ContextNorm | None
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
def pack(decoder: Decoder, dtype: torch.dtype, device: torch.device, make: MakeLinear, swiglu: Swiglu) -> Weights:
    """Pack ``decoder``, which is not changed, with the op ``swiglu``. ``make`` turns weight and bias into a Linear.

    The first and last linears, of patches, context and velocity, are always dense: they are small, and what they lose
    goes straight into the pixels.

    The first linear takes patch rows (c, py, px) as the convolution does; the last one's rows are permuted from the
    model's (py, px, c) to the same order, so that state and velocity have one layout.
    """
    config, packer = decoder.config, Packer(device, dtype, make)
    p = config.patch_size
    final, embed = decoder.final_layer.linear, decoder.patch_embed
    order = torch.arange(3 * p * p, device=final.weight.device).view(p, p, 3).permute(2, 0, 1).flatten()
    assert embed.bias is not None
    context_rope, _ = decoder.rope_tables(config.grid_size, device)
    context_embed, context_norm, contexts = _context(packer, decoder)
    blocks: list[Any] = list(decoder.blocks)
    return Weights(
        patch_embed=packer.dense_of(embed.weight.flatten(1), embed.bias),
        context_embed=context_embed,
        context_norm=context_norm,
        context_null=packer.tensor(decoder.context_null),
        context_rope=context_rope,
        blocks=[_block(packer, b, swiglu) for b in blocks],
        contexts=contexts,
        final=packer.dense_of(final.weight[order], final.bias[order]),
        dtype=dtype,
    )


def _block(packer: Packer, block: JointBlock | CrossBlock, swiglu: Swiglu) -> BlockWeights:
    streams = (block.context, block.image) if isinstance(block, JointBlock) else (block.image,)
    weight, bias = (torch.stack([_qk_norm(s, name) for s in streams]) for name in ("weight", "bias"))
    packed = tuple(_stream(packer, s, swiglu) for s in streams)
    return BlockWeights(packed, packer.tensor(weight), packer.tensor(bias))


def _stream(packer: Packer, s: Stream, swiglu: Swiglu) -> StreamWeights:
    if s.kv_only:
        return StreamWeights(packer.linear(s.kv), None, None, None)
    mlp = packer.swiglu(s.mlp.w1, s.mlp.w3, swiglu), packer.linear(s.mlp.w2)
    return StreamWeights(packer.linear(s.qkv), packer.linear(s.proj), *mlp)


def _qk_norm(s: Stream, name: str) -> Tensor:
    """(2, head_dim), of q and k; zeros for a q that does not exist."""
    k: Tensor = getattr(s.k_norm, name)
    return torch.stack([torch.zeros_like(k) if s.kv_only else getattr(s.q_norm, name), k])


def _context(packer: Packer, decoder: Decoder) -> tuple[Linear, ContextNorm | None, list[ContextWeights]]:
    if decoder.config.decoder.conditioning == "joint":
        return packer.dense(decoder.context_embed), None, []
    folded = fold_context(decoder)
    ones = packer.tensor(torch.ones_like(folded.embed[1]), torch.float32)
    contexts = []
    blocks: list[Any] = list(decoder.blocks)
    for block, kv in zip(blocks, folded.kv, strict=True):
        weight, bias = packer.pair(block.context.k_norm)
        contexts.append(ContextWeights(packer.dense_of(*kv), weight[None, None], bias[None, None]))
    return packer.dense_of(*folded.embed), ContextNorm(torch.zeros_like(ones)[None], ones, folded.eps), contexts
