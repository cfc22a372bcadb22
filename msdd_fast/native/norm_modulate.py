"""The C++ ``norm_modulate`` without a residual."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from msdd_fast.native._call import GIVEN, Native, like, metadata, optional_metadata, prepared


@Native
def norm_modulate(
    x: Tensor, shift: Tensor, scale: Tensor, run: int, eps: float, rms_weight: Tensor | None = None
) -> Callable[..., Tensor]:
    """LayerNorm over the last dimension of x, contiguous, then * (1 + scale) + shift; row r takes min(r // run, G - 1).

    Tables (G, D), the elements of a row adjacent. With rms_weight, (D,) or a table, RMSNorm and its weight instead.
    """
    tables = metadata("shift", shift), metadata("scale", scale), optional_metadata("rms_weight", rms_weight)
    absent = None, None  # y and gate
    return prepared("norm_modulate", like(x.shape, x.dtype), 0, GIVEN, metadata("x", x), *absent, *tables, run, eps)
