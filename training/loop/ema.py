"""Exponential moving average of the weights."""

from __future__ import annotations

import copy

import torch

from msdd_fast.tokenizer import Tokenizer


class Ema:
    """Moving average of a tokenizer's weights, kept as a tokenizer of its own.

    Args:
        model: copied; the copy is in eval mode and has no gradients.
        decay: upper bound. At step s the decay is at most (1 + s) / (10 + s).
    """

    def __init__(self, model: Tokenizer, decay: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, model: Tokenizer, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        for average, parameter in zip(self.model.parameters(), model.parameters(), strict=True):
            average.lerp_(parameter, 1.0 - decay)
