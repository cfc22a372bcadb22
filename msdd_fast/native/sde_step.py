"""The C++ ``sde_step``."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from msdd_fast.native._call import Native, check_scalars, check_seeds, entry, metadata, optional_metadata


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
    call, shape = entry("sde_step"), tuple(x.shape)
    check_scalars(t=t, t_next=t_next)
    of_x, of_v, of_noise = metadata("x", x), metadata("v", v), optional_metadata("noise", noise)
    count = None if seeds is None else check_seeds(seeds)
    has_next, empty = t_next is not None, not x.numel()

    def run(x: Tensor, v: Tensor, t: Tensor, *rest: Tensor) -> Tensor:
        out = x.new_empty(shape)
        if empty:
            return out
        call(
            out.data_ptr(),
            (x.data_ptr(), *of_x),
            (v.data_ptr(), *of_v),
            None if of_noise is None else (rest[1].data_ptr(), *of_noise),
            (0, 0) if count is None else (rest[1].data_ptr(), count),
            t.data_ptr(),
            rest[0].data_ptr() if has_next else 0,
            stage,
            patch,
            clamp,
        )
        return out

    return run
