"""The C++ ``norm_modulate`` without a residual."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from msdd_fast.native._call import Native, entry, metadata, optional_metadata


@Native
def norm_modulate(
    x: Tensor, shift: Tensor, scale: Tensor, run: int, eps: float, rms_weight: Tensor | None = None
) -> Callable[..., Tensor]:
    """LayerNorm over the last dimension of x, contiguous, then * (1 + scale) + shift; row r takes min(r // run, G - 1).

    Tables (G, D), the elements of a row adjacent. With rms_weight, (D,) or a table, RMSNorm and its weight instead.
    """
    call = entry("norm_modulate")
    of_x, of_shift, of_scale = metadata("x", x), metadata("shift", shift), metadata("scale", scale)
    of_weight = optional_metadata("rms_weight", rms_weight)
    if not x.numel():
        return lambda x, *_: torch.empty_like(x)

    def run_it(x: Tensor, shift: Tensor, scale: Tensor, rms_weight: Tensor | None = None) -> Tensor:
        h = torch.empty_like(x)
        tables = (shift.data_ptr(), *of_shift), (scale.data_ptr(), *of_scale)
        weight = None if rms_weight is None or of_weight is None else (rms_weight.data_ptr(), *of_weight)
        call(h.data_ptr(), 0, (x.data_ptr(), *of_x), None, None, *tables, run, eps, weight)
        return h

    return run_it
