"""stage_transition: the last Euler step of a stage and the start of the next in one pass
(docs/spec.md#sampler; paper Eq. 3 to 5).

    E   = x + dt * v,  or  x + dt * (v_uncond + scale * (v - v_uncond)) with guidance
    out = alpha * nearest_x2(E) + beta * n,   n: unit normals with ``correlation`` inside each 2x2 block

on patch rows: x (N, B, C*p*p), N = g*g tokens row by row, features in (c, py, px) order; out (4N, B, C*p*p),
contiguous, in x's dtype: what renoise_upsample(euler_step(...)) would give as an image, but with E not rounded in
between. One token becomes exactly four. p is even, so that a block of noise lies inside one token.

x, v and v_uncond each float32, bfloat16 or float16; float32 inside, rounded once. The velocities may be slices such as
v[:, :B] of a (N, 2B, C*p*p) tensor, which are read in place. n comes from the stream of seeds[b] and ``stage`` and is
never stored. Moves 6 elements for each element of x (7 with guidance): two (three) reads, four writes. The eager
reference is differentiable.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from msdd_fast import native
from msdd_fast.backends.triton import TRITON
from msdd_fast.diffusion import noise
from msdd_fast.diffusion.patch_rows import patchify, unpatchify_rows
from msdd_fast.layout import with_contiguous_rows
from msdd_fast.ops._checks import as_scalar, check_blocks, check_correlation, check_device, check_seeds, check_stage
from msdd_fast.ops._example import normals
from msdd_fast.ops._native import register_native
from msdd_fast.ops._patches import check_patch_size, check_rows, check_velocity, euler_eager
from msdd_fast.ops._registry import Op
from msdd_fast.ops.renoise_upsample import renoise_upsample_with


def stage_transition(
    x: Tensor,
    v: Tensor,
    dt: float | Tensor,
    alpha: float | Tensor,
    beta: float | Tensor,
    seeds: Tensor,
    stage: int,
    patch_size: int,
    correlation: float = -1.0 / 3.0,
    v_uncond: Tensor | None = None,
    scale: float | Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Patch rows at the start of ``stage`` from those before the last step of the stage before it.

    Args:
        x: (N, B, C*p*p), N a square number.
        v, v_uncond: like x, any of the float dtypes; ``v_uncond`` and ``scale`` only with guidance, then both.
        dt, alpha, beta, scale: numbers, or float tensors of one element on x's device.
        seeds: int64 (B,) on x's device, in [0, 2^63).
        stage: index of the stage that starts, 0 to 2^32 - 1.
        patch_size: p, even.
        correlation: inside a 2x2 block, in [-1/3, 1).

    Raises InputError for anything else.
    """
    check_patch_size(patch_size, even=True)
    check_rows(x, patch_size)
    tokens, batch, features = x.shape
    side = 2 * math.isqrt(tokens) * patch_size
    check_blocks(features // patch_size**2, side, side)
    dt, scale = check_velocity(x, v, dt, v_uncond, scale)
    check_seeds(seeds, batch)
    check_device("seeds", seeds, "x", x)
    check_stage(stage)
    correlation = check_correlation(correlation)
    alpha, beta = as_scalar("alpha", alpha, x.device), as_scalar("beta", beta, x.device)
    arguments = (x, v, dt, alpha, beta, seeds, stage, patch_size, correlation, v_uncond, scale)
    out: Tensor = OP(*arguments, backend=backend)
    return out


def stage_transition_eager(
    x: Tensor,
    v: Tensor,
    dt: Tensor,
    alpha: Tensor,
    beta: Tensor,
    seeds: Tensor,
    stage: int,
    patch_size: int,
    correlation: float,
    v_uncond: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """Reference: plain torch, by way of the image."""
    image = unpatchify_rows(euler_eager(x, v, dt, v_uncond, scale), patch_size)
    c, h, w = image.shape[1:]
    n = noise.renoise_noise(seeds, (c, 2 * h, 2 * w), stage, correlation)
    return patchify(renoise_upsample_with(image, alpha, beta, n), patch_size).to(x.dtype)


def _fake(x: Tensor, *_: object) -> Tensor:
    return x.new_empty(4 * x.shape[0], x.shape[1], x.shape[2])


def _contiguous(
    x: Tensor,
    v: Tensor,
    dt: Tensor,
    alpha: Tensor,
    beta: Tensor,
    seeds: Tensor,
    stage: int,
    patch_size: int,
    correlation: float,
    v_uncond: Tensor | None = None,
    scale: Tensor | None = None,
) -> tuple[Any, ...]:
    """The arguments as the kernels read them; copies only what is laid out otherwise."""
    v, v_uncond = with_contiguous_rows(v), None if v_uncond is None else with_contiguous_rows(v_uncond)
    scalars = (dt, alpha, beta, seeds.contiguous(), stage, patch_size, correlation)
    return x.contiguous(), v, *scalars, v_uncond, scale


def _triton(*args: Any) -> Tensor:
    from msdd_fast.kernels.stage_transition import stage_transition as launch

    return launch(*_contiguous(*args))


def _example() -> tuple[Any, ...]:
    x, v, v_uncond = normals(*[(4, 2, 48)] * 3)  # 2 x 2 patches of 4 pixels
    dt, alpha, beta, scale = torch.tensor([0.5, 0.7, 0.3, 1.5]).unbind()
    return x, v, dt, alpha, beta, torch.tensor([3, 4]), 2, 4, 0.25, v_uncond, scale


OP = Op(
    "stage_transition",
    "(Tensor x, Tensor v, Tensor dt, Tensor alpha, Tensor beta, Tensor seeds, int stage, int patch_size, "
    "float correlation, Tensor? v_uncond=None, Tensor? scale=None) -> Tensor",
    stage_transition_eager,
    _fake,
    _example,
)
register_native(OP, native.stage_transition, _contiguous)
OP.register(TRITON, _triton)
