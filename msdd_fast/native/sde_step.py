"""The C++ ``sde_step``."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from msdd_fast.native._call import (
    GIVEN,
    Native,
    check_scalars,
    check_seeds,
    like,
    metadata,
    optional_metadata,
    prepared,
)


@Native
def sde_step(
    x: Tensor,
    v: Tensor,
    t: Tensor,
    t_next: Tensor | None,
    seeds: Tensor | None,
    stage: int,
    noise: Tensor | None,
    patch: int,
    clamp: bool,
) -> Callable[..., Tensor]:
    """x - t * v, then noise; all contiguous. v is (N, B, p * p, C) with ``patch`` p, like x (B, C, H, W) with 0."""
    check_scalars(t=t, t_next=t_next)
    operands = metadata("x", x), metadata("v", v), GIVEN, 0 if t_next is None else GIVEN
    of_noise = (0, 0) if seeds is None else check_seeds(seeds), optional_metadata("noise", noise)
    return prepared("sde_step", like(x.shape, x.dtype), GIVEN, *operands, *of_noise, stage, patch, clamp)
