"""Copies of a decoder's weights in an engine's dtype and on its device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from msdd_fast.layers.convolution import Convolution, Convolve, Fused, Separate, Shortcut, UpsampleConvolution, fuses
from msdd_fast.layers.linear.base import Linear, MakeLinear, Swiglu
from msdd_fast.layers.linear.dense import DenseLinear
from msdd_fast.ops import Ops


class Packer:
    """Packs modules' parameters for one engine. Always copies: training the model on does not change the engine.

    Args:
        make: turns a weight (out, in) and a bias into a Linear.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, make: MakeLinear = DenseLinear) -> None:
        self.device, self.dtype, self.make = device, dtype, make

    def tensor(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """A copy in the engine's dtype, or another."""
        return x.detach().to(self.device, self.dtype if dtype is None else dtype, copy=True)

    def pair(self, module: Any) -> tuple[Tensor, Tensor]:
        """Weight and bias of a norm in the engine's dtype."""
        return self.tensor(module.weight), self.tensor(module.bias)

    def pair32(self, module: Any) -> tuple[Tensor, Tensor]:
        """Weight and bias of a norm in float32."""
        return self.tensor(module.weight, torch.float32), self.tensor(module.bias, torch.float32)

    def modulation(self, module: Any) -> tuple[Tensor, Tensor]:
        """A norm as ``norm_modulate`` takes it: shift and scale (1, D), float32, its bias and its weight minus one."""
        weight, bias = self.pair32(module)
        return bias[None], weight[None] - 1

    def linear(self, *modules: nn.Module) -> Linear:
        """Linears side by side, by ``make``. 1 x 1 convolutions are linears of pixels."""
        return self.make(*self._joined(modules))

    def swiglu(self, w1: nn.Linear, w3: nn.Linear, op: Swiglu) -> Linear:
        """silu(w1 x) * w3 x in one, by ``make``; ``op`` where the product does not have it within."""
        return self.make(*self._joined((w1, w3)), op)

    def dense(self, *modules: nn.Module) -> DenseLinear:
        """The same, always dense."""
        return DenseLinear(*self._joined(modules))

    def dense_of(self, weight: Tensor, bias: Tensor) -> DenseLinear:
        """A dense linear of a weight (out, in) and a bias."""
        return DenseLinear(self.tensor(weight), self.tensor(bias))

    def convolution(self, module: nn.Conv2d) -> Convolution:
        """A convolution of PyTorch."""
        replicated = module.padding_mode == "replicate"
        return Convolution(self.tensor(module.weight), self.tensor(bias_of(module)), module.stride[0], replicated)

    def convolve(self, module: nn.Conv2d, ops: Ops, shortcut: nn.Conv2d | None = None, up: bool = False) -> Convolve:
        """A 3 x 3 convolution with the norm before it and, with ``shortcut``, a 1 x 1 one added to it; ``up`` behind a
        nearest upsampling. In one where that is faster."""
        bias, also = bias_of(module), None
        if shortcut is not None:
            bias, also = bias.float() + bias_of(shortcut).float(), shortcut.weight
        kind = "up" if up else "down" if module.stride[0] == 2 else "same"
        return self.convolve_of(module.weight, bias, ops, also, kind)

    def convolve_of(
        self, weight: Tensor, bias: Tensor | None, ops: Ops, shortcut: Tensor | None = None, kind: str = "same"
    ) -> Convolve:
        """The same of a weight (out, in, 3, 3), the bias of both and a shortcut's weight (out, also, 1, 1)."""
        whole = self.tensor(weight, torch.float32)
        fused, reason = fuses(self.device, self.dtype)
        if fused:
            bias = None if bias is None else self.tensor(bias, torch.float32)
            also = None if shortcut is None else self.tensor(shortcut.flatten(1), torch.float32)
            return Fused(whole, bias, self.dtype, kind, also, f"convolutions of the extension: {reason}")
        bias = None if bias is None else self.tensor(bias)
        if kind == "up":
            assert bias is not None
            return Separate(UpsampleConvolution(whole, bias), None, ops, weight.shape)
        convolution = Convolution(self.tensor(weight), bias, 2 if kind == "down" else 1)
        return Separate(convolution, None if shortcut is None else Shortcut(self.tensor(shortcut)), ops, weight.shape)

    def _joined(self, modules: Sequence[Any]) -> tuple[Tensor, Tensor | None]:
        weights = [m.weight.flatten(1) for m in modules]
        biases = [m.bias for m in modules if m.bias is not None]
        return self.tensor(torch.cat(weights)), self.tensor(torch.cat(biases)) if biases else None


def bias_of(module: nn.Conv2d | nn.Linear) -> Tensor:
    """The bias of a module that has one."""
    assert module.bias is not None
    return module.bias
