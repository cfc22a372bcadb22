"""sde_step: one step of a sampler that estimates the image and adds new noise.

    x0  = x - t * v                                 in float64, then rounded to float32
    out = (1 - t_next) * x0 + t_next * noise        or x0, where there is no t_next; with ``clamp`` limited to [-1, 1]

x (B, C, H, W); v likewise or, with ``patch_size`` p, as the network leaves it: (N, B, p * p, C), the pixels of tokens,
both row by row, N = (H / p)(W / p). t and t_next are float32 scalars in (0, 1]. The noise is given, (B, C, H, W), or
that of ``seeds``, int64 (B,), with even H and W: white normals of step ``stage`` in each image's stream
(docs/spec.md#noise), independent of its start noise. Each float32, bfloat16 or float16. out is contiguous, of x's
dtype.

x - t * v is computed in float64, everything after it in float32. Moves 3 B C H W elements, and with given noise 4.
Inference only but for eager, which is differentiable.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from msdd_fast import native
from msdd_fast.backends.triton import TRITON
from msdd_fast.diffusion import noise as streams
from msdd_fast.diffusion.checks import check_bool
from msdd_fast.errors import InputError
from msdd_fast.ops._checks import (
    as_scalar,
    check_blocks,
    check_device,
    check_float,
    check_image,
    check_seeds,
    check_stage,
)
from msdd_fast.ops._example import normals
from msdd_fast.ops._native import register_native
from msdd_fast.ops._registry import Op


def sde_step(
    x: Tensor,
    v: Tensor,
    t: float | Tensor,
    t_next: float | Tensor | None = None,
    seeds: Tensor | None = None,
    stage: int = 0,
    noise: Tensor | None = None,
    patch_size: int | None = None,
    clamp: bool = False,
    *,
    backend: str | None = None,
) -> Tensor:
    """The next state, or the image; see the module. Raises InputError for arguments that do not fit together."""
    check_image("x", x)
    batch, channels, height, width = x.shape
    check_float("v", v)
    if patch_size is None:
        expected: tuple[int, ...] = tuple(x.shape)
    else:
        p = patch_size
        if isinstance(p, bool) or not isinstance(p, int) or p < 1 or height % p or width % p:
            raise InputError(f"patch_size must be a divisor of {height} and {width}, got {p!r}")
        expected = ((height // p) * (width // p), batch, p * p, channels)
    if v.shape != expected:
        raise InputError(f"v must be {expected}, got {tuple(v.shape)}")
    check_device("v", v, "x", x)
    if t_next is None and (seeds is not None or noise is not None):
        raise InputError("seeds and noise need t_next: without it no noise is added")
    if t_next is not None and (seeds is None) == (noise is None):
        raise InputError("pass either seeds or noise with t_next")
    check_stage(stage)
    if seeds is not None:
        check_seeds(seeds, batch)
        check_device("seeds", seeds, "x", x)
        if height % 2 or width % 2:
            raise InputError(f"x must have even height and width (noise comes in 2x2 blocks), got {height}x{width}")
        check_blocks(channels, height, width)
    if noise is not None:
        check_float("noise", noise)
        if noise.shape != x.shape:
            raise InputError(f"noise must have the shape of x, {tuple(x.shape)}, got {tuple(noise.shape)}")
        check_device("noise", noise, "x", x)
    check_bool("clamp", clamp)
    t = as_scalar("t", t, x.device)
    t_next = None if t_next is None else as_scalar("t_next", t_next, x.device)
    out: Tensor = OP(x, v, t, t_next, seeds, stage, noise, patch_size, clamp, backend=backend)
    return out


def sde_step_eager(
    x: Tensor,
    v: Tensor,
    t: Tensor,
    t_next: Tensor | None,
    seeds: Tensor | None,
    stage: int,
    noise: Tensor | None,
    patch_size: int | None,
    clamp: bool,
) -> Tensor:
    """Reference: plain torch."""
    if patch_size is not None:
        v = fold_pixels(v, x.shape[2] // patch_size, patch_size)
    x0 = (x.double() - t.double() * v.double()).float()
    if t_next is not None:
        if seeds is not None:
            noise = streams.renoise_noise(seeds, (x.shape[1], x.shape[2], x.shape[3]), stage, 0.0)
        assert noise is not None
        x0 = (1 - t_next) * x0 + t_next * noise.float()
    return (x0.clamp(-1, 1) if clamp else x0).to(x.dtype).contiguous()


def fold_pixels(pixels: Tensor, rows: int, patch_size: int) -> Tensor:
    """Pixels of tokens (N, B, p * p, C) as an image (B, C, H, W); ``rows`` of tokens."""
    n, batch, _, channels = pixels.shape
    p, columns = patch_size, n // max(1, rows)
    grid = pixels.reshape(rows, columns, batch, p, p, channels)
    return grid.permute(2, 5, 0, 3, 1, 4).reshape(batch, channels, rows * p, columns * p)


def _contiguous(
    x: Tensor,
    v: Tensor,
    t: Tensor,
    t_next: Tensor | None,
    seeds: Tensor | None,
    stage: int,
    noise: Tensor | None,
    patch_size: int | None,
    clamp: bool,
) -> tuple[Any, ...]:
    """The arguments as the kernels read them; patch size 0 for an image."""
    seeds, noise = (None if s is None else s.contiguous() for s in (seeds, noise))
    return x.contiguous(), v.contiguous(), t, t_next, seeds, stage, noise, patch_size or 0, clamp


def _triton(*args: Any) -> Tensor:
    from msdd_fast.kernels.sde_step import sde_step as launch

    return launch(*_contiguous(*args))


def _example() -> tuple[Any, ...]:
    x, v = normals((2, 3, 4, 6), (2, 3, 4, 6))
    return x, v, torch.tensor(0.7), torch.tensor(0.3), torch.tensor([3, 4]), 2, None, None, True


OP = Op(
    "sde_step",
    "(Tensor x, Tensor v, Tensor t, Tensor? t_next, Tensor? seeds, int stage, Tensor? noise, int? patch_size, "
    "bool clamp) -> Tensor",
    sde_step_eager,
    lambda x, *_: torch.empty_like(x, memory_format=torch.contiguous_format),
    _example,
)
register_native(OP, native.sde_step, _contiguous)
OP.register(TRITON, _triton)
