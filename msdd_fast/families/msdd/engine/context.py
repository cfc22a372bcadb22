"""The cross blocks' path from latents to keys and values, folded to few more dimensions than latents have.

A latent token z of l numbers is embedded to e = E z + b of D, normalised, and multiplied by each block's matrix W:

    kv = W (gamma * (e - mean(e)) / sqrt(var(e) + eps) + beta) + c

The centred e - mean(e) is linear in (z, 1), so it lies in a space of r = min(D, l + 1) dimensions. With an orthonormal
basis Q of that space (QR of the centred [E b]) it is Q R (z, 1). ``frame`` F (w, r) has orthonormal columns, too, so
with u = F R (z, 1) it is Q F^T u, and var(e) = |u|^2 / D. Hence

    kv = (W diag(gamma) Q F^T) u / sqrt(|u|^2 / D + eps) + (W beta + c)

which is an RMSNorm of u and products with w inputs instead of D. The w = r numbers of the smallest frame would do; but
then each of bfloat16's rounding errors weighs more, where so far those of D numbers averaged out.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from msdd_fast.families.msdd.decoder import Decoder
from msdd_fast.families.msdd.mmdit import ContextKeyValue

REDUNDANCY = 3
"""Numbers of a folded token for each dimension. An image of msdd-nano in bfloat16 is then 3 % farther from that in
float32 than without folding; with as many numbers as dimensions, 17 %."""
MULTIPLE = 32
"""Of the width: what the matrix instructions of CPUs and GPUs multiply at once."""


class FoldedContext(NamedTuple):
    """In float32, for a decoder of width D, latents of l numbers and folded width w."""

    embed: tuple[Tensor, Tensor]
    """Weight (w, l) and bias (w,): z to u."""
    eps: float
    """Of the RMSNorm of u."""
    kv: list[tuple[Tensor, Tensor]]
    """Of each block: weight (2 D, w) and bias (2 D,)."""


def folded_width(hidden_size: int, latent_dim: int) -> int:
    """Numbers of a folded latent token."""
    return min(hidden_size, math.ceil(REDUNDANCY * (latent_dim + 1) / MULTIPLE) * MULTIPLE)


@torch.no_grad()
def fold_context(decoder: Decoder) -> FoldedContext:
    """Fold a decoder with cross blocks, in float64."""
    (embed, embed_bias), (gamma, beta) = (_double(m) for m in (decoder.context_embed, decoder.context_norm))
    width, latent_dim = embed.shape
    w = folded_width(width, latent_dim)
    affine = torch.cat([embed, embed_bias[:, None]], dim=1)
    basis, u = torch.linalg.qr(affine - affine.mean(dim=0))
    f = frame(w, len(u))
    basis, u = basis @ f.T, f @ u
    # The mean of u's squares is |u|^2 / w.
    scale, eps = math.sqrt(width / w), decoder.context_norm.eps * width / w
    kv = []
    for block in decoder.blocks:
        assert isinstance(block.context, ContextKeyValue)
        weight, bias = _double(block.context.kv)
        kv.append(((scale * weight * gamma @ basis).float(), (weight @ beta + bias).float()))
    return FoldedContext((u[:, :-1].float(), u[:, -1].float()), eps, kv)


def frame(rows: int, columns: int) -> Tensor:
    """Orthonormal columns (``rows``, ``columns``), float64, none of whose entries is large: a cosine transform's."""
    points, frequencies = (torch.arange(n, dtype=torch.float64, device="cpu") for n in (rows, columns))
    waves = math.sqrt(2 / rows) * torch.cos(math.pi / rows * torch.outer(points + 0.5, frequencies))
    waves[:, 0] /= math.sqrt(2)
    return waves


def _double(module: torch.nn.Module) -> tuple[Tensor, Tensor]:
    weight, bias = module.weight, module.bias
    assert isinstance(weight, Tensor) and isinstance(bias, Tensor)
    return weight.cpu().double(), bias.cpu().double()
