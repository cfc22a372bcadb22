"""Calls the C++ ``stage_transition``."""

from __future__ import annotations

import torch
from torch import Tensor

from msdd_fast.errors import InputError
from msdd_fast.native._call import _call, _check_seeds, _patch_operands, _seeds


def stage_transition(
    x: Tensor,
    v: Tensor,
    dt: Tensor,
    alpha: Tensor,
    beta: Tensor,
    seeds: Tensor,
    stage: int,
    patch_size: int,
    correlation: float,
    v_uncond: Tensor | None,
    scale: Tensor | None,
) -> Tensor:
    """Patch rows (4N, B, C*p*p) of the next stage's start, in x's dtype, from those of this one's end, (N, B, C*p*p).

    The last dimension of every tensor must be contiguous; scalars of one element; seeds int64 (B,); p even.
    """
    operands, shape = _patch_operands(x, v, v_uncond, scale, patch_size)
    seeds = _check_seeds(seeds)
    if len(seeds) != x.shape[1] or patch_size % 2:
        raise InputError(f"one seed per image and an even patch_size are needed, got {len(seeds)} and {patch_size}")
    out = torch.empty(4 * x.shape[0], *x.shape[1:], dtype=x.dtype, device="cpu")
    if out.numel():
        euler = (dt.item(), 0.0 if scale is None else scale.item())
        noise = (_seeds(seeds), alpha.item(), beta.item(), stage, correlation)
        _call("stage_transition", out.data_ptr(), *operands, shape, *euler, *noise)
    return out
