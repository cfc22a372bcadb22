"""A PiD decoder's weights as the engine wants them: packed, in one dtype, without dead ones and those of time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from msdd_fast import native
from msdd_fast.backends.extension import extension_status
from msdd_fast.families.pid.blocks import JointBlock, PixelBlock
from msdd_fast.families.pid.decoder import PiDDecoder, SigmaGate
from msdd_fast.layers.convolution import Convolution
from msdd_fast.layers.linear.base import Linear, MakeLinear, Swiglu
from msdd_fast.layers.packer import Packer
from msdd_fast.ops.pixel_block import split_modulation


@dataclass(frozen=True)
class StreamWeights:
    """One stream's part of a joint block. That of the last block's caption has ``qkv`` = [k, v] and ``norm1`` only."""

    norm1: Tensor
    qkv: Linear
    proj: Linear | None
    norm2: Tensor | None
    gate_up: Linear | None
    """[w1 | w3] with their SwiGLU."""
    down: Linear | None


@dataclass(frozen=True)
class JointWeights:
    """A joint block; ``qk_norm`` is (2, 2, head_dim): caption and image, q and k."""

    text: StreamWeights
    image: StreamWeights
    qk_norm: Tensor


@dataclass(frozen=True)
class GateWeights:
    """A gate's two halves: of the latents' features, with the bias, and of the tokens.

    ``tokens`` is a linear for a gate of every channel, else a vector (D,). ``alpha`` is float32 ().
    """

    head: Linear
    """Latent features F of the tokens of the convolutional network."""
    features: Linear
    tokens: Linear | Tensor
    alpha: Tensor


@dataclass(frozen=True)
class Modulation:
    """A part of the matrix that makes a pixel block's modulations; ``packed`` is for the C++ kernel."""

    weight: Tensor
    bias: Tensor
    norm: Tensor
    packed: Tensor | None

    def memory(self) -> int:
        return sum(t.nbytes for t in (self.weight, self.bias, self.packed) if t is not None)


@dataclass(frozen=True)
class PixelWeights:
    """A pixel block; ``mlp`` are fc1's weight and bias, then fc2's."""

    first: Modulation
    compress: Linear
    qkv: Linear
    qk_norm: Tensor
    proj: Linear
    expand: Linear
    second: Modulation
    mlp: tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class LatentWeights:
    """The convolutional network of latents."""

    first: Convolution
    second: Convolution
    blocks: list[tuple[tuple[Tensor, Tensor], Convolution, tuple[Tensor, Tensor], Convolution]]
    """Norm, convolution, norm, convolution."""

    def memory(self) -> int:
        convolutions = [self.first, self.second, *(c for b in self.blocks for c in (b[1], b[3]))]
        return sum(c.memory() for c in convolutions)


@dataclass(frozen=True)
class PiDWeights:
    """All weights that a decode reads, but for those of time, which are in the tables."""

    patch: Linear
    pixel: Linear
    text: Linear
    text_norm: Tensor
    text_position: Tensor
    latents: LatentWeights
    gates: list[GateWeights]
    pixel_gate: GateWeights | None
    joint: list[JointWeights]
    pixels: list[PixelWeights]
    final_norm: Tensor
    final: Linear
    dtype: torch.dtype

    def memory(self) -> int:
        """Bytes of all matrices and kernels."""
        linears: list[Linear | None] = [self.patch, self.pixel, self.text, self.final]
        for gate in (*self.gates, *([] if self.pixel_gate is None else [self.pixel_gate])):
            linears += [gate.head, gate.features, None if isinstance(gate.tokens, Tensor) else gate.tokens]
        for joint in self.joint:
            for s in (joint.text, joint.image):
                linears += [s.qkv, s.proj, s.gate_up, s.down]
        for block in self.pixels:
            linears += [block.compress, block.qkv, block.proj, block.expand]
        others = self.latents.memory() + sum(b.first.memory() + b.second.memory() for b in self.pixels)
        return sum(x.memory() for x in linears if x is not None) + self.text_position.nbytes + others


@torch.no_grad()
def pack(decoder: PiDDecoder, dtype: torch.dtype, device: torch.device, make: MakeLinear, swiglu: Swiglu) -> PiDWeights:
    """Pack ``decoder``, which is not changed, with the op ``swiglu``. Norms' weights stay float32."""
    packer = Packer(device, dtype, make)
    projection: Any = decoder.lq_proj
    joint: list[Any] = list(decoder.patch_blocks)
    pixels: list[Any] = list(decoder.pixel_blocks)
    pit = decoder.pit_lq_gate
    gates = zip(projection.output_heads, projection.gate_modules, strict=True)
    return PiDWeights(
        patch=packer.dense(decoder.s_embedder.proj),
        pixel=packer.dense(decoder.pixel_embedder.proj),
        text=packer.dense(decoder.y_embedder.proj),
        text_norm=_norm(packer, decoder.y_embedder.norm),
        text_position=packer.tensor(decoder.y_pos_embedding)[0],
        latents=_latents(packer, projection.latent_proj),
        gates=[_gate(packer, head, gate) for head, gate in gates],
        pixel_gate=None if pit is None else _gate(packer, projection.pit_head, pit),
        joint=[_joint(packer, b, swiglu, is_last=b is joint[-1]) for b in joint],
        pixels=[_pixels(packer, b) for b in pixels],
        final_norm=_norm(packer, decoder.final_layer.norm),
        final=packer.dense(decoder.final_layer.linear),
        dtype=dtype,
    )


def _norm(packer: Packer, module: Any) -> Tensor:
    return packer.tensor(module.weight, torch.float32)


def _qk_norm(packer: Packer, *modules: Any) -> Tensor:
    return packer.tensor(torch.stack([m.weight for m in modules]), torch.float32)


def _joint(packer: Packer, block: JointBlock, swiglu: Swiglu, is_last: bool) -> JointWeights:
    attn = block.attn
    norms = (attn.q_norm_y, attn.k_norm_y, attn.q_norm_x, attn.k_norm_x)
    image = StreamWeights(
        norm1=_norm(packer, block.norm_x1),
        qkv=packer.linear(attn.qkv_x),
        proj=packer.linear(attn.proj_x),
        norm2=_norm(packer, block.norm_x2),
        gate_up=packer.swiglu(block.mlp_x.w1, block.mlp_x.w3, swiglu),
        down=packer.linear(block.mlp_x.w2),
    )
    if is_last:  # nothing reads the caption's tokens any more: keys and values only
        keys_values = packer.make(packer.tensor(attn.qkv_y.weight[attn.qkv_y.out_features // 3 :]), None)
        text = StreamWeights(_norm(packer, block.norm_y1), keys_values, None, None, None, None)
    else:
        text = StreamWeights(
            norm1=_norm(packer, block.norm_y1),
            qkv=packer.linear(attn.qkv_y),
            proj=packer.linear(attn.proj_y),
            norm2=_norm(packer, block.norm_y2),
            gate_up=packer.swiglu(block.mlp_y.w1, block.mlp_y.w3, swiglu),
            down=packer.linear(block.mlp_y.w2),
        )
    return JointWeights(text, image, _qk_norm(packer, *norms).view(2, 2, -1))


def _gate(packer: Packer, head: Any, gate: SigmaGate) -> GateWeights:
    weight, bias = gate.content_proj.weight, gate.content_proj.bias
    width = weight.shape[1] // 2
    tokens = weight[:, :width]
    return GateWeights(
        head=packer.linear(head),
        features=packer.dense_of(weight[:, width:], bias),
        tokens=packer.tensor(tokens[0], torch.float32)
        if len(weight) == 1
        else packer.make(packer.tensor(tokens), None),
        alpha=packer.tensor(gate.log_alpha, torch.float32).exp(),
    )


def _pixels(packer: Packer, block: PixelBlock) -> PixelWeights:
    modulation: Any = block.adaLN_modulation[0]
    channels = block.norm1.weight.numel()
    first, second = split_modulation(modulation.weight, modulation.bias, channels)
    return PixelWeights(
        first=_modulation(packer, *first, block.norm1),
        compress=packer.linear(block.compress_to_attn),
        qkv=packer.linear(block.attn.qkv),
        qk_norm=_qk_norm(packer, block.attn.q_norm, block.attn.k_norm)[None],
        proj=packer.linear(block.attn.proj),
        expand=packer.linear(block.expand_from_attn),
        second=_modulation(packer, *second, block.norm2),
        mlp=(*packer.pair(block.mlp.fc1), *packer.pair(block.mlp.fc2)),
    )


def _modulation(packer: Packer, weight: Tensor, bias: Tensor, norm: Any) -> Modulation:
    weight = packer.tensor(weight)
    packed = None
    if weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.bfloat16) and extension_status()[0]:
        has_data = type(weight) is Tensor  # those of ``explain`` have none
        packed = native.pack_linear(weight) if has_data else weight.new_empty(0)
    return Modulation(weight, packer.tensor(bias), _norm(packer, norm), packed)


def _latents(packer: Packer, modules: Any) -> LatentWeights:
    first, _, second, *blocks = modules
    return LatentWeights(
        first=packer.convolution(first),
        second=packer.convolution(second),
        blocks=[
            (
                packer.pair32(b.block[0]),
                packer.convolution(b.block[2]),
                packer.pair32(b.block[3]),
                packer.convolution(b.block[5]),
            )
            for b in blocks
        ],
    )
