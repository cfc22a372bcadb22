"""The C++ ``pixel_block``."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from msdd_fast.native._call import Native, entry, metadata


@Native
def pixel_block(
    x: Tensor,
    y: Tensor,
    s: Tensor,
    packed: Tensor,
    bias: Tensor,
    rms_weight: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    eps: float,
    level: str = "",
) -> Callable[..., Tensor]:
    """Gated residual, RMSNorm, adaLN, MLP and gated residual of pixels x (R, K, C) by the packed layer of s (R, D).

    All contiguous but s, whose rows may be apart; packed is ``pack_linear`` of a weight (K * 4 * C, D) in the dtype of
    s, for ``level`` (linear.h), which is for tests. (R, K, C) in the dtype of x.
    """
    call, shape, empty = entry("pixel_block"), tuple(x.shape), not x.numel()
    operands = dict(x=x, y=y, s=s, packed=packed, bias=bias, rms_weight=rms_weight)
    operands |= dict(fc1_weight=fc1_weight, fc1_bias=fc1_bias, fc2_weight=fc2_weight, fc2_bias=fc2_bias)
    of = [metadata(name, t) for name, t in operands.items()]

    def run(*tensors: Tensor) -> Tensor:
        out = tensors[0].new_empty(shape)
        if not empty:
            call(out.data_ptr(), *((t.data_ptr(), *m) for t, m in zip(tensors, of, strict=True)), eps, level)
        return out

    return run
