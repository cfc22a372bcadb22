"""Initialisation that makes attention look at its own place before anything is learnt (docs/spec.md#position-prior).

With two-axis RoPE, a constant part b in every query and key adds sum_i |b_i|^2 cos(theta_i (p_q - p_k) + phi_i)
to the scores: a kernel in relative position. Here every head gets such a kernel, peaked at an offset of its
own: head h of H looks ``radius`` final-grid patches away in the direction 2 pi h / H, with radii 0.5, 1, 2, 4
in turn over the layers. Queries and keys are normalised, so the constant part is put into the bias of the
projections, where it outweighs the content, and the norm's weight sets how peaked the kernel is.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from msdd_fast.families.msdd.config import RopeConfig
from msdd_fast.families.msdd.mmdit import ContextKeyValue, Stream

RADII = (0.5, 1.0, 2.0, 4.0)
# Content has a standard deviation of about 0.6 at initialisation.
BIAS = 2.0


@torch.no_grad()
def init_position_prior(blocks: nn.ModuleList, config: RopeConfig) -> None:
    """Set biases of the q and k projections and weights of the q and k norms of all ``blocks``.

    Does nothing unless positions are comparable (``image_rope="rotary"``, ``context_positions="grid"``) and
    ``config.position_prior`` is positive.
    """
    if config.position_prior <= 0 or config.image_rope != "rotary" or config.context_positions != "grid":
        return
    for layer, block in enumerate(blocks):
        for module in block.modules():
            if isinstance(module, Stream) and not module.kv_only:
                width = module.qkv.in_features
                offsets = _offsets(width // module.head_dim, RADII[layer % len(RADII)])
                module.qkv.bias[:width] = _query_bias(offsets, module.head_dim, config.base).flatten()
                module.qkv.bias[width : 2 * width] = _key_bias(width, module.head_dim, config.base)
                module.q_norm.weight.fill_(config.position_prior)
                module.k_norm.weight.fill_(config.position_prior)
            elif isinstance(module, (Stream, ContextKeyValue)):
                width = module.kv.in_features
                module.kv.bias[:width] = _key_bias(width, module.head_dim, config.base)
                module.k_norm.weight.fill_(config.position_prior)


def _offsets(heads: int, radius: float) -> Tensor:
    """Row and column offset of every head (heads, 2)."""
    angle = 2 * math.pi * torch.arange(heads) / heads
    return radius * torch.stack([angle.cos(), angle.sin()], dim=1)


def _query_bias(offsets: Tensor, head_dim: int, base: float) -> Tensor:
    """(heads, head_dim): interleaved pairs turned by theta_i * offset; signs alternate to keep the mean near zero."""
    n = head_dim // 4
    theta = base ** (-torch.arange(n) / n)
    angle = torch.cat([offsets[:, :1] * theta, offsets[:, 1:] * theta], dim=1)
    sign = torch.ones(2 * n)
    sign[1::2] = -1.0
    return BIAS * (torch.stack([angle.cos(), angle.sin()], dim=-1) * sign[:, None]).flatten(1)


def _key_bias(width: int, head_dim: int, base: float) -> Tensor:
    return _query_bias(torch.zeros(width // head_dim, 2), head_dim, base).flatten()
