"""The C++ ``norm_modulate`` with a gated residual before the norm."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from msdd_fast.native._call import Native, entry, metadata, optional_metadata


@Native
def gate_residual_norm_modulate(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    run: int,
    eps: float,
    rms_weight: Tensor | None = None,
) -> Callable[..., tuple[Tensor, Tensor]]:
    """x_new = x + gate * y and norm_modulate(x_new), see there; y like x, but of any dtype."""
    call = entry("norm_modulate")
    of_x, of_y = metadata("x", x), metadata("y", y)
    of_gate, of_shift, of_scale = metadata("gate", gate), metadata("shift", shift), metadata("scale", scale)
    of_weight = optional_metadata("rms_weight", rms_weight)
    if not x.numel():
        return lambda x, *_: (torch.empty_like(x), torch.empty_like(x))

    def run_it(
        x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, rms_weight: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        x_new, h = torch.empty_like(x), torch.empty_like(x)
        call(
            h.data_ptr(),
            x_new.data_ptr(),
            (x.data_ptr(), *of_x),
            (y.data_ptr(), *of_y),
            (gate.data_ptr(), *of_gate),
            (shift.data_ptr(), *of_shift),
            (scale.data_ptr(), *of_scale),
            run,
            eps,
            None if rms_weight is None or of_weight is None else (rms_weight.data_ptr(), *of_weight),
        )
        return x_new, h

    return run_it
