"""The C++ ``stage_transition``."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from msdd_fast.errors import InputError
from msdd_fast.native._call import GIVEN, Native, check_scalars, check_seeds, like, prepared
from msdd_fast.native._patches import patch_operands


@Native
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
) -> Callable[..., Tensor]:
    """Patch rows (4N, B, C*p*p) of the next stage's start, in x's dtype, from those of this one's end, (N, B, C*p*p).

    The last dimension of every tensor is contiguous; scalars of one element; seeds int64 (B,), contiguous; p even.
    """
    check_scalars(dt=dt, alpha=alpha, beta=beta, scale=scale)
    of_x, of_v, of_uncond, shape = patch_operands(x, v, v_uncond, scale, patch_size)
    of_seeds, out = check_seeds(seeds), like((4 * x.shape[0], *x.shape[1:]), x.dtype)
    if len(seeds) != x.shape[1] or patch_size % 2:
        raise InputError(f"one seed per image and an even patch_size are needed, got {len(seeds)} and {patch_size}")
    scalars = GIVEN, GIVEN, GIVEN
    guidance = of_uncond, 0 if scale is None else GIVEN
    noise = stage, correlation
    return prepared("stage_transition", out, GIVEN, of_x, of_v, *scalars, of_seeds, *guidance, shape, *noise)
