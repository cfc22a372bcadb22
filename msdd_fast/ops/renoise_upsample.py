"""renoise_upsample: the end state of a stage to the start state of the next (docs/spec.md#renoise; paper Eq. 3).

    out = alpha * nearest_x2(x) + beta * n,   n: unit normals with ``correlation`` inside each 2x2 block

x (B, C, H, W) in float32, bfloat16 or float16; out (B, C, 2H, 2W), same dtype and memory format (contiguous or
channels-last), computed in float32
and rounded once. n comes from the stream of seeds[b] and ``stage`` and is never stored.
Moves 5 * B*C*H*W elements: one read, four writes. The eager reference is differentiable in x.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from msdd_fast import native
from msdd_fast.backends.triton import TRITON
from msdd_fast.diffusion import noise
from msdd_fast.layout import dense, memory_order
from msdd_fast.ops._checks import (
    as_scalar,
    check_blocks,
    check_correlation,
    check_device,
    check_image,
    check_seeds,
    check_stage,
)
from msdd_fast.ops._example import normals
from msdd_fast.ops._native import register_native
from msdd_fast.ops._registry import Op


def renoise_upsample(
    x: Tensor,
    alpha: float | Tensor,
    beta: float | Tensor,
    seeds: Tensor,
    stage: int,
    correlation: float = -1.0 / 3.0,
    *,
    backend: str | None = None,
) -> Tensor:
    """Upsample and renoise ``x``.

    Args:
        x: (B, C, H, W).
        alpha, beta: numbers, or float tensors of one element on x's device.
        seeds: int64 (B,) on x's device, in [0, 2^63).
        stage: index of the stage that starts, 0 to 2^32 - 1.
        correlation: inside a 2x2 block, in [-1/3, 1).

    Raises InputError for anything else.
    """
    check_image("x", x)
    check_blocks(x.shape[1], 2 * x.shape[2], 2 * x.shape[3])
    check_seeds(seeds, len(x))
    check_device("seeds", seeds, "x", x)
    check_stage(stage)
    correlation = check_correlation(correlation)
    alpha, beta = as_scalar("alpha", alpha, x.device), as_scalar("beta", beta, x.device)
    out: Tensor = OP(x, alpha, beta, seeds, stage, correlation, backend=backend)
    return out


def renoise_upsample_eager(
    x: Tensor, alpha: Tensor, beta: Tensor, seeds: Tensor, stage: int, correlation: float
) -> Tensor:
    """Reference: plain torch."""
    c, h, w = x.shape[1:]
    n = noise.renoise_noise(seeds, (c, 2 * h, 2 * w), stage, correlation)
    return renoise_upsample_with(x, alpha, beta, n)


def renoise_upsample_with(x: Tensor, alpha: float | Tensor, beta: float | Tensor, n: Tensor) -> Tensor:
    """The same with a given noise tensor (B, C, 2H, 2W): for parity with recorded noise."""
    up = F.interpolate(x.float(), scale_factor=2.0, mode="nearest")
    return (alpha * up + beta * n).to(x.dtype).contiguous(memory_format=memory_order(x))


def _fake(x: Tensor, alpha: Tensor, beta: Tensor, seeds: Tensor, stage: int, correlation: float) -> Tensor:
    b, c, h, w = x.shape
    return torch.empty(b, c, 2 * h, 2 * w, dtype=x.dtype, device=x.device, memory_format=memory_order(x))


def _contiguous(
    x: Tensor, alpha: Tensor, beta: Tensor, seeds: Tensor, stage: int, correlation: float
) -> tuple[Any, ...]:
    """The arguments as the kernels read them; copies only what is laid out otherwise."""
    return dense(x), alpha, beta, seeds.contiguous(), stage, correlation


def _triton(*args: Any) -> Tensor:
    from msdd_fast.kernels.renoise_upsample import renoise_upsample as launch

    return launch(*_contiguous(*args))


def _example() -> tuple[Any, ...]:
    (x,) = normals((2, 3, 4, 6))
    return x, torch.tensor(0.7), torch.tensor(0.3), torch.tensor([3, 4]), 2, 0.25


OP = Op(
    "renoise_upsample",
    "(Tensor x, Tensor alpha, Tensor beta, Tensor seeds, int stage, float correlation) -> Tensor",
    renoise_upsample_eager,
    _fake,
    _example,
)
register_native(OP, native.renoise_upsample, _contiguous)
OP.register(TRITON, _triton)
