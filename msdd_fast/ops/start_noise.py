"""start_noise: the white unit normals that a decode starts from.

    out[b, c, y, x] = normal of pixel (y, x) of channel c in the stream of seeds[b]        (docs/spec.md#noise)

seeds int64 (B,) in [0, 2^63); out (B, C, H, W), H and W even, float32, bfloat16 or float16 (rounded once). With
``patch_size`` p, even, the same numbers as patch rows (H/p * W/p, B, C*p*p), features in (c, py, px) order.
Moves B*C*H*W elements: one write. Inference only but for eager, which needs no gradient either.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from msdd_fast import native
from msdd_fast.backends.triton import TRITON
from msdd_fast.diffusion import noise
from msdd_fast.diffusion.checks import as_int
from msdd_fast.diffusion.patch_rows import patchify
from msdd_fast.errors import InputError
from msdd_fast.ops._checks import check_blocks, check_dtype, check_seeds
from msdd_fast.ops._native import register_native
from msdd_fast.ops._patches import check_patch_size
from msdd_fast.ops._registry import Op


def start_noise(
    seeds: Tensor,
    shape: tuple[int, int, int],
    dtype: torch.dtype = torch.float32,
    patch_size: int | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Normals (B, *shape) for ``shape`` = (C, H, W), or their patch rows, on the device of ``seeds``.

    Raises InputError for seeds that are not int64 (B,) or negative, an odd height or width, another dtype, a patch size
    that is odd or does not divide height and width.
    """
    check_seeds(seeds)
    check_dtype("dtype", dtype)
    if not isinstance(shape, (tuple, list)) or len(shape) != 3:
        raise InputError(f"shape must be (C, H, W), got {shape!r}")
    channels, height, width = (as_int("shape", size, 0) for size in shape)
    if height % 2 or width % 2:
        raise InputError(f"shape must be (C, H, W) with even H and W (noise comes in 2x2 blocks), got {tuple(shape)}")
    check_blocks(channels, height, width)
    if patch_size is not None:
        check_patch_size(patch_size, even=True)
        if height % patch_size or width % patch_size:
            raise InputError(f"shape must hold whole patches of {patch_size}x{patch_size} pixels, got {tuple(shape)}")
    out: Tensor = OP(seeds, channels, height, width, dtype, patch_size, backend=backend)
    return out


def start_noise_eager(
    seeds: Tensor, channels: int, height: int, width: int, dtype: torch.dtype, patch_size: int | None = None
) -> Tensor:
    """Reference: plain torch."""
    image = noise.start_noise(seeds, (channels, height, width)).to(dtype)
    return image if patch_size is None else patchify(image, patch_size)


def _fake(
    seeds: Tensor, channels: int, height: int, width: int, dtype: torch.dtype, patch_size: int | None = None
) -> Tensor:
    batch = seeds.shape[0]
    if patch_size is None:
        return torch.empty(batch, channels, height, width, dtype=dtype, device=seeds.device)
    tokens = (height // patch_size) * (width // patch_size)
    return torch.empty(tokens, batch, channels * patch_size**2, dtype=dtype, device=seeds.device)


def _contiguous(
    seeds: Tensor, channels: int, height: int, width: int, dtype: torch.dtype, patch_size: int | None = None
) -> tuple[Any, ...]:
    """The arguments as the kernels read them."""
    return seeds.contiguous(), channels, height, width, dtype, patch_size


def _triton(*args: Any) -> Tensor:
    from msdd_fast.kernels.start_noise import start_noise as launch

    return launch(*_contiguous(*args))


def _example() -> tuple[Any, ...]:
    return torch.tensor([3, 4]), (3, 4, 6), torch.float32


OP = Op(
    "start_noise",
    "(Tensor seeds, SymInt channels, SymInt height, SymInt width, ScalarType dtype, int? patch_size=None) -> Tensor",
    start_noise_eager,
    _fake,
    _example,
)
register_native(OP, native.start_noise, _contiguous)
OP.register(TRITON, _triton)
