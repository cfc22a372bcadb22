"""Torch wrappers of the C++ functions: check the tensors here, pass addresses and sizes there.

Same signatures and results as in msdd_fast.noise (integers bit for bit, normals to 1e-6), for the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from msdd_fast.backends import load_extension
from msdd_fast.errors import InputError
from msdd_fast.noise import correlation_factors


def start_noise_cpu(seeds: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """White unit normals, float32 (B, C, H, W), for int64 seeds (B,) on the CPU and shape (C, H, W), H and W even.

    Raises InputError on anything else, BackendUnavailableError if the extension is missing.
    """
    seeds, shape = _check_seeds(seeds), _check_shape(shape)
    extension = load_extension()
    out = torch.empty(len(seeds), *shape)
    extension.start_noise(out.data_ptr(), seeds.data_ptr(), *out.shape, torch.get_num_threads())
    return out


def renoise_noise_cpu(seeds: Tensor, shape: tuple[int, int, int], stage: int, correlation: float) -> Tensor:
    """Unit normals correlated inside 2x2 blocks, float32 (B, C, H, W); stage >= 0, correlation in [-1/3, 1).

    Arguments and errors otherwise as for start_noise_cpu.
    """
    seeds, shape = _check_seeds(seeds), _check_shape(shape)
    if isinstance(stage, bool) or not isinstance(stage, int) or not 0 <= stage < 2**32:
        raise InputError(f"stage must be an int in [0, 2^32), got {stage!r}")
    correlation_factors(correlation)  # for its check of the range
    extension = load_extension()
    out = torch.empty(len(seeds), *shape)
    extension.renoise_noise(out.data_ptr(), seeds.data_ptr(), *out.shape, stage, correlation, torch.get_num_threads())
    return out


def _check_seeds(seeds: Tensor) -> Tensor:
    if not isinstance(seeds, Tensor):
        raise InputError(f"seeds must be an int64 tensor (B,) on the CPU, got {type(seeds).__name__}")
    if seeds.dtype != torch.int64 or seeds.dim() != 1 or seeds.device.type != "cpu":
        got = f"{seeds.dtype} {tuple(seeds.shape)} on {seeds.device}"
        raise InputError(f"seeds must be an int64 tensor (B,) on the CPU, got {got}")
    return seeds.contiguous()


def _check_shape(shape: Sequence[int]) -> tuple[int, int, int]:
    if len(shape) != 3 or any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in shape):
        raise InputError(f"shape must be three non-negative ints (C, H, W), got {tuple(shape)}")
    c, h, w = shape
    if h % 2 or w % 2:
        raise InputError(f"shape must have even height and width (noise comes in 2x2 blocks), got {h}x{w}")
    if c * (h // 2) * (w // 2) > 2**32:
        raise InputError(f"shape must hold at most 2^32 blocks of 2x2 pixels, got {tuple(shape)}")
    return c, h, w
