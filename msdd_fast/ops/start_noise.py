"""start_noise: the white unit normals that a decode starts from.

    out[b, c, y, x] = normal of pixel (y, x) of channel c in the stream of seeds[b]        (DESIGN section 7)

seeds int64 (B,) in [0, 2^63); out (B, C, H, W), H and W even, float32, bfloat16 or float16 (rounded once).
Moves B*C*H*W elements: one write. Inference only but for eager, which needs no gradient either.
"""

from __future__ import annotations

import torch
from torch import Tensor

from msdd_fast import noise
from msdd_fast.backends import can_use_cpu, can_use_triton
from msdd_fast.errors import InputError
from msdd_fast.ops._checks import check_blocks, check_dtype, check_seeds
from msdd_fast.ops._op import Op


def start_noise(
    seeds: Tensor, shape: tuple[int, int, int], dtype: torch.dtype = torch.float32, *, backend: str | None = None
) -> Tensor:
    """Normals (B, *shape) for ``shape`` = (C, H, W) on the device of ``seeds``.

    Raises InputError for seeds that are not int64 (B,) or negative, an odd height or width, another dtype.
    """
    check_seeds(seeds)
    check_dtype("dtype", dtype)
    channels, height, width = shape
    if min(shape) < 0 or height % 2 or width % 2:
        raise InputError(f"shape must be (C, H, W) with even H and W (noise comes in 2x2 blocks), got {tuple(shape)}")
    check_blocks(channels, height, width)
    out: Tensor = OP(seeds, channels, height, width, dtype, backend=backend)
    return out


def start_noise_eager(seeds: Tensor, channels: int, height: int, width: int, dtype: torch.dtype) -> Tensor:
    """Reference: plain torch."""
    return noise.start_noise(seeds, (channels, height, width)).to(dtype)


def _fake(seeds: Tensor, channels: int, height: int, width: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(seeds.shape[0], channels, height, width, dtype=dtype, device=seeds.device)


def _triton(seeds: Tensor, channels: int, height: int, width: int, dtype: torch.dtype) -> Tensor:
    from msdd_fast.kernels.start_noise import start_noise as launch

    return launch(seeds.contiguous(), channels, height, width, dtype)


def _cpu(seeds: Tensor, channels: int, height: int, width: int, dtype: torch.dtype) -> Tensor:
    from msdd_fast import native

    return native.start_noise(seeds, channels, height, width, dtype)


OP = Op(
    "start_noise",
    "(Tensor seeds, SymInt channels, SymInt height, SymInt width, ScalarType dtype) -> Tensor",
    start_noise_eager,
    _fake,
)
OP.register("cpu", _cpu, lambda seeds, *_: can_use_cpu(seeds))
OP.register("triton", _triton, lambda seeds, *_: can_use_triton(seeds))
