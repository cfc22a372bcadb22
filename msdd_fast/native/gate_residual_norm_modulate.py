"""The C++ ``norm_modulate`` with a gated residual before the norm."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from msdd_fast.native._call import GIVEN, Native, like, metadata, optional_metadata, prepared


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
    rows = metadata("x", x), metadata("y", y)
    tables = metadata("gate", gate), metadata("shift", shift), metadata("scale", scale)
    weight, out = optional_metadata("rms_weight", rms_weight), like(x.shape, x.dtype)
    return prepared("norm_modulate", (out, out), GIVEN, GIVEN, *rows, *tables, weight, run, eps)
