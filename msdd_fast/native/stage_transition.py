"""The C++ ``stage_transition``."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from msdd_fast.errors import InputError
from msdd_fast.native._call import Native, check_scalars, check_seeds, dense_layout, entry
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
    call = entry("stage_transition")
    of_x, of_v, of_uncond, shape = patch_operands(x, v, v_uncond, scale, patch_size)
    count, layout = check_seeds(seeds), dense_layout((4 * x.shape[0], *x.shape[1:]))
    if count != x.shape[1] or patch_size % 2:
        raise InputError(f"one seed per image and an even patch_size are needed, got {count} and {patch_size}")

    filled = x.numel() > 0

    def run(
        x: Tensor,
        v: Tensor,
        dt: Tensor,
        alpha: Tensor,
        beta: Tensor,
        seeds: Tensor,
        v_uncond: Tensor | None = None,
        scale: Tensor | None = None,
    ) -> Tensor:
        out = x.new_empty_strided(*layout)
        if filled:
            call(
                out.data_ptr(),
                (x.data_ptr(), *of_x),
                (v.data_ptr(), *of_v),
                None if v_uncond is None or of_uncond is None else (v_uncond.data_ptr(), *of_uncond),
                shape,
                dt.data_ptr(),
                0 if scale is None else scale.data_ptr(),
                (seeds.data_ptr(), count),
                alpha.data_ptr(),
                beta.data_ptr(),
                stage,
                correlation,
            )
        return out

    return run
