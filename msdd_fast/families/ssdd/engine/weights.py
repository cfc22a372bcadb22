"""An SSDD decoder's weights as the engine wants them: one matrix for each kind of projection of the latents."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from msdd_fast.families.ssdd.decoder import DownBlock, ResBlock, TransformerBlock, UpBlock, UViTDecoder
from msdd_fast.layers.convolution import Convolve, Fused
from msdd_fast.layers.linear.dense import DenseLinear
from msdd_fast.layers.packer import Packer, bias_of
from msdd_fast.ops import Ops


@dataclass(frozen=True)
class ResWeights:
    """A residual block; its shortcut is in ``conv2``."""

    conv1: Convolve
    conv2: Convolve


@dataclass(frozen=True)
class LevelWeights:
    """One level of the way down or up; ``resample`` leads to the next one, None at the end."""

    blocks: list[ResWeights]
    resample: Convolve | None


@dataclass(frozen=True)
class TransformerWeights:
    """A transformer block. ``qkv`` is [q | k | v], ``shift`` and ``scale`` (1, C) are norm2's bias and weight - 1."""

    qkv: DenseLinear
    table: Tensor
    out: DenseLinear
    shift: Tensor
    scale: Tensor
    value_gate: DenseLinear
    down: DenseLinear


@dataclass(frozen=True)
class MidWeights:
    norm: tuple[Tensor, Tensor]
    proj_in: DenseLinear
    blocks: list[TransformerWeights]
    proj_out: DenseLinear


@dataclass(frozen=True)
class SSDDWeights:
    """All weights that a decode reads, but for those of time, which are in the tables.

    ``modulations`` gives the (scale, shift) of all residual blocks' first norms, in their order of use; ``adaln`` the
    (shift, scale) of all transformer blocks. ``image_in`` and ``latents_in`` are the two parts of conv_in.
    """

    image_in: Convolve
    latents_in: Convolve
    context: tuple[Convolve, Convolve]
    modulations: DenseLinear
    adaln: DenseLinear
    down: list[LevelWeights]
    mid: MidWeights
    up: list[LevelWeights]
    norm_out: tuple[Tensor, Tensor]
    out: Convolve
    dtype: torch.dtype

    @property
    def fused(self) -> bool:
        """Whether the extension convolves (``layers.convolution.Fused``)."""
        return isinstance(self.out, Fused)

    def memory(self) -> int:
        """Bytes of all matrices and kernels."""
        parts: list[Convolve | DenseLinear] = [
            self.image_in,
            self.latents_in,
            *self.context,
        ]
        parts += [self.modulations, self.adaln, self.mid.proj_in, self.mid.proj_out, self.out]
        tensors = [b.table for b in self.mid.blocks]
        for block in self.mid.blocks:
            parts += [block.qkv, block.out, block.value_gate, block.down]
        for level in (*self.down, *self.up):
            parts += [level.resample] if level.resample is not None else []
            for res in level.blocks:
                parts += [res.conv1, res.conv2]
        return sum(p.memory() for p in parts) + sum(t.nbytes for t in tensors)


def res_blocks(decoder: UViTDecoder) -> list[ResBlock]:
    """All residual blocks in the order in which they run."""
    return [r for level in (*decoder.down_blocks, *decoder.up_blocks) for r in level.resnets]


@torch.no_grad()
def pack_ssdd(decoder: UViTDecoder, dtype: torch.dtype, device: torch.device, ops: Ops) -> SSDDWeights:
    """Pack ``decoder``, which is not changed. Norms' vectors and bias tables stay float32."""
    packer, mid = Packer(device, dtype), decoder.mid_block
    conv_in, ctx = decoder.conv_in, decoder.ada_ctx_proj
    blocks: list[Any] = list(mid.transformer_blocks)
    return SSDDWeights(
        image_in=packer.convolve_of(conv_in.weight[:, :3], None, ops),
        latents_in=packer.convolve_of(conv_in.weight[:, 3:], bias_of(conv_in), ops),
        context=(packer.convolve(ctx[0], ops), packer.convolve(ctx[2], ops)),  # type: ignore[arg-type]
        modulations=packer.dense(*(block.norm1.ctx_proj for block in res_blocks(decoder))),
        adaln=packer.dense(*(block.norm1.linear for block in blocks)),
        down=[_down(packer, ops, level) for level in decoder.down_blocks],  # type: ignore[arg-type]
        mid=MidWeights(
            norm=packer.pair32(mid.norm),
            proj_in=packer.dense(mid.proj_in),
            blocks=[_transformer(packer, b) for b in blocks],
            proj_out=packer.dense(mid.proj_out),
        ),
        up=[_up(packer, ops, level) for level in decoder.up_blocks],  # type: ignore[arg-type]
        norm_out=packer.pair32(decoder.conv_norm_out),
        out=packer.convolve(decoder.conv_out, ops),
        dtype=dtype,
    )


def _residual(packer: Packer, ops: Ops, block: Any) -> ResWeights:
    return ResWeights(packer.convolve(block.conv1, ops), packer.convolve(block.conv2, ops, block.conv_shortcut))


def _transformer(packer: Packer, block: TransformerBlock) -> TransformerWeights:
    attn = block.attn1
    weight, bias = packer.pair32(block.norm2)
    return TransformerWeights(
        qkv=packer.dense(attn.to_q, attn.to_k, attn.to_v),
        table=packer.tensor(block.relative_position_bias.relative_bias_table, torch.float32),
        out=packer.dense(attn.out_proj),
        shift=bias[None],
        scale=weight[None] - 1,
        value_gate=packer.dense(block.ff.proj_in_act.proj),
        down=packer.dense(block.ff.proj_out),
    )


def _down(packer: Packer, ops: Ops, level: DownBlock) -> LevelWeights:
    downsamplers: list[Any] = list(level.downsamplers)
    resample = [packer.convolve(d.conv, ops) for d in downsamplers]
    return LevelWeights([_residual(packer, ops, r) for r in level.resnets], resample[0] if resample else None)


def _up(packer: Packer, ops: Ops, level: UpBlock) -> LevelWeights:
    upsamplers: list[Any] = list(level.upsamplers)
    resample = [packer.convolve(u.conv, ops, up=True) for u in upsamplers]
    return LevelWeights([_residual(packer, ops, r) for r in level.resnets], resample[0] if resample else None)
