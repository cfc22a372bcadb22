"""An SSDD decoder's weights as the engine wants them: one matrix for each kind of projection of the latents."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from msdd_fast.families.ssdd.decoder import DownBlock, ResBlock, TransformerBlock, UpBlock, UViTDecoder
from msdd_fast.layers.convolution import Convolution, Shortcut, UpsampleConvolution
from msdd_fast.layers.linear.dense import DenseLinear


@dataclass(frozen=True)
class ResWeights:
    """A residual block. The bias of ``shortcut`` is in that of ``conv2``."""

    conv1: Convolution
    conv2: Convolution
    shortcut: Shortcut | None


@dataclass(frozen=True)
class LevelWeights:
    """One level of the way down or up; ``resample`` leads to the next one, None at the end."""

    blocks: list[ResWeights]
    resample: Convolution | UpsampleConvolution | None


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

    image_in: Convolution
    latents_in: Convolution
    context: tuple[Convolution, Convolution]
    modulations: DenseLinear
    adaln: DenseLinear
    down: list[LevelWeights]
    mid: MidWeights
    up: list[LevelWeights]
    norm_out: tuple[Tensor, Tensor]
    out: Convolution
    dtype: torch.dtype

    def memory(self) -> int:
        """Bytes of all matrices and kernels."""
        parts: list[Convolution | UpsampleConvolution | Shortcut | DenseLinear] = [
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
                parts += [res.shortcut] if res.shortcut is not None else []
        return sum(p.memory() for p in parts) + sum(t.nbytes for t in tensors)


def res_blocks(decoder: UViTDecoder) -> list[ResBlock]:
    """All residual blocks in the order in which they run."""
    return [r for level in (*decoder.down_blocks, *decoder.up_blocks) for r in level.resnets]


@torch.no_grad()
def pack_ssdd(decoder: UViTDecoder, dtype: torch.dtype, device: torch.device) -> SSDDWeights:
    """Pack ``decoder``, which is not changed. Norms' vectors and bias tables stay float32."""

    def tensor(x: Tensor, kind: torch.dtype = dtype) -> Tensor:
        return x.detach().to(device, kind, copy=True)  # training the tokenizer on does not change an engine

    def affine(norm: nn.GroupNorm | nn.LayerNorm) -> tuple[Tensor, Tensor]:
        return tensor(norm.weight, torch.float32), tensor(norm.bias, torch.float32)

    def bias_of(module: nn.Conv2d | nn.Linear) -> Tensor:
        assert module.bias is not None
        return module.bias

    def linear(*modules: nn.Module) -> DenseLinear:
        """Side by side; 1 x 1 convolutions are linears of pixels."""
        weights = [m.weight.flatten(1) for m in modules if isinstance(m, (nn.Linear, nn.Conv2d))]
        biases = [m.bias for m in modules if isinstance(m, (nn.Linear, nn.Conv2d)) and m.bias is not None]
        return DenseLinear(tensor(torch.cat(weights)), tensor(torch.cat(biases)) if biases else None)

    def conv(module: nn.Conv2d, also: nn.Conv2d | None = None) -> Convolution:
        bias = bias_of(module) if also is None else bias_of(module).float() + bias_of(also).float()
        return Convolution(tensor(module.weight), tensor(bias), module.stride[0])

    def res(block: ResBlock) -> ResWeights:
        shortcut = None if block.conv_shortcut is None else Shortcut(tensor(block.conv_shortcut.weight))
        return ResWeights(conv(block.conv1), conv(block.conv2, block.conv_shortcut), shortcut)

    def transformer(block: TransformerBlock) -> TransformerWeights:
        attn = block.attn1
        weight, bias = affine(block.norm2)
        return TransformerWeights(
            qkv=linear(attn.to_q, attn.to_k, attn.to_v),
            table=tensor(block.relative_position_bias.relative_bias_table, torch.float32),
            out=linear(attn.out_proj),
            shift=bias[None],
            scale=weight[None] - 1,
            value_gate=linear(block.ff.proj_in_act.proj),
            down=linear(block.ff.proj_out),
        )

    def upsample(module: nn.Conv2d) -> UpsampleConvolution:
        return UpsampleConvolution(tensor(module.weight, torch.float32), tensor(bias_of(module)))

    def down_level(level: DownBlock) -> LevelWeights:
        resample = [conv(d.conv) for d in level.downsamplers]  # type: ignore[arg-type]
        return LevelWeights([res(r) for r in level.resnets], resample[0] if resample else None)  # type: ignore[arg-type]

    def up_level(level: UpBlock) -> LevelWeights:
        resample = [upsample(u.conv) for u in level.upsamplers]  # type: ignore[arg-type]
        return LevelWeights([res(r) for r in level.resnets], resample[0] if resample else None)  # type: ignore[arg-type]

    mid = decoder.mid_block
    blocks: list[TransformerBlock] = list(mid.transformer_blocks)  # type: ignore[arg-type]
    conv_in, ctx = decoder.conv_in, decoder.ada_ctx_proj
    return SSDDWeights(
        image_in=Convolution(tensor(conv_in.weight[:, :3]), None),
        latents_in=Convolution(tensor(conv_in.weight[:, 3:]), tensor(bias_of(conv_in))),
        context=(conv(ctx[0]), conv(ctx[2])),  # type: ignore[arg-type]
        modulations=linear(*(block.norm1.ctx_proj for block in res_blocks(decoder))),
        adaln=linear(*(block.norm1.linear for block in blocks)),
        down=[down_level(level) for level in decoder.down_blocks],  # type: ignore[arg-type]
        mid=MidWeights(
            norm=affine(mid.norm),
            proj_in=linear(mid.proj_in),
            blocks=[transformer(b) for b in blocks],
            proj_out=linear(mid.proj_out),
        ),
        up=[up_level(level) for level in decoder.up_blocks],  # type: ignore[arg-type]
        norm_out=affine(decoder.conv_norm_out),
        out=conv(decoder.conv_out),
        dtype=dtype,
    )
