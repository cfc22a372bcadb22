"""The C++ ``norm_modulate`` without a residual."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from msdd_fast.native._call import Native, entry, metadata


@Native
def norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, run: int, eps: float) -> Callable[..., Tensor]:
    """LayerNorm over the last dimension of x, contiguous, then * (1 + scale) + shift; row r takes min(r // run, G - 1).

    Tables (G, D), the elements of a row adjacent.
    """
    call = entry("norm_modulate")
    of_x, of_shift, of_scale = metadata("x", x), metadata("shift", shift), metadata("scale", scale)
    if not x.numel():
        return lambda x, shift, scale: torch.empty_like(x)

    def run_it(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        h = torch.empty_like(x)
        tables = (shift.data_ptr(), *of_shift), (scale.data_ptr(), *of_scale)
        call(h.data_ptr(), 0, (x.data_ptr(), *of_x), None, None, *tables, run, eps)
        return h

    return run_it
