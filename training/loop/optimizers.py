"""Optimisers and their learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from msdd_fast.errors import ConfigError
from msdd_fast.tokenizer import Tokenizer
from msdd_fast.training.loop.config import AdamConfig, OptimConfig
from msdd_fast.training.loop.muon import Muon


def build_optimizers(model: Tokenizer, config: OptimConfig) -> list[torch.optim.Optimizer]:
    """AdamW alone, or Muon for the blocks' matrices and AdamW for the rest."""
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    muon: list[nn.Parameter] = []
    if config.optimizer == "muon":
        # adaLN matrices start at zero and act on one slowly varying vector: they stay with AdamW.
        muon = [p for name, p in trainable if p.ndim == 2 and ".blocks." in name and ".adaln." not in name]
        if not muon:
            raise ConfigError("optimizer 'muon' is for matrices of transformer blocks, and there are none; use 'adamw'")
    rest = [p for _, p in trainable if all(p is not m for m in muon)]
    optimizers: list[torch.optim.Optimizer] = [build_adamw(rest, config)]
    if muon:
        optimizers.append(Muon(muon, lr=config.lr, weight_decay=config.weight_decay))
    return optimizers


def build_adamw(parameters: Iterable[nn.Parameter], config: AdamConfig) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only."""
    parameters = list(parameters)
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas)


def learning_rate_factor(step: int, total: int, config: AdamConfig) -> float:
    """Linear warm-up to 1, then a cosine to ``min_lr_ratio``."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, total - config.warmup_steps)
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    return config.min_lr_ratio + (1.0 - config.min_lr_ratio) * cosine


def set_learning_rate(optimizers: Iterable[torch.optim.Optimizer], step: int, total: int, config: AdamConfig) -> float:
    """Set and return the learning rate of ``step``."""
    lr = config.lr * learning_rate_factor(step, total, config)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
    return lr
