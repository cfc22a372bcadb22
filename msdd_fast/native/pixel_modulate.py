"""The C++ ``pixel_modulate``."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from msdd_fast.native._call import Native, entry, metadata


@Native
def pixel_modulate(
    x: Tensor, s: Tensor, packed: Tensor, bias: Tensor, rms_weight: Tensor, eps: float, level: str = ""
) -> Callable[..., Tensor]:
    """RMSNorm and adaLN of pixels x (R, K, C) by the packed layer of features s (R, D); (R, K, C) in the dtype of s.

    All contiguous but s, whose rows may be apart; packed is ``pack_linear`` of a weight (K * 2 * C, D) in the dtype of
    s, for ``level`` (linear.h), which is for tests.
    """
    call, shape = entry("pixel_modulate"), tuple(x.shape)
    of_x, of_s, of_packed = metadata("x", x), metadata("s", s), metadata("packed", packed)
    of_bias, of_weight = metadata("bias", bias), metadata("rms_weight", rms_weight)
    empty = not x.numel()

    def run(x: Tensor, s: Tensor, packed: Tensor, bias: Tensor, rms_weight: Tensor) -> Tensor:
        out = s.new_empty(shape)
        if empty:
            return out
        call(
            out.data_ptr(),
            (x.data_ptr(), *of_x),
            (s.data_ptr(), *of_s),
            (packed.data_ptr(), *of_packed),
            (bias.data_ptr(), *of_bias),
            (rms_weight.data_ptr(), *of_weight),
            eps,
            level,
        )
        return out

    return run
