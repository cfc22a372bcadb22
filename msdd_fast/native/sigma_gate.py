"""The C++ ``sigma_gate``."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from msdd_fast.native._call import Native, entry, metadata, optional_metadata


@Native
def sigma_gate(
    x: Tensor,
    y: Tensor,
    offset: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    rms_weight: Tensor | None,
    logit: Tensor | None,
    weight: Tensor | None,
    run: int,
    eps: float,
) -> Callable[..., tuple[Tensor, Tensor]]:
    """x_new = x + sigmoid(logit + offset) * y and its RMSNorm and adaLN, an empty tensor without shift.

    x and y (*, D) contiguous; offset and logit (*, 1) or (*, D), views of (R, 1 or D) with adjacent elements in a row;
    weight and rms_weight (D,); tables (G, D), row r takes min(r // run, G - 1). Either logit or weight is None.
    """
    call, rows, width = entry("sigma_gate"), x.shape[:-1].numel(), x.shape[-1]
    operands = (x, y, offset, shift, scale, rms_weight, logit, weight)
    names = ("x", "y", "offset", "shift", "scale", "rms_weight", "logit", "weight")
    of = [optional_metadata(name, t) for name, t in zip(names, operands, strict=True)]
    for i in (0, 1, 2, 6):  # as rows
        t = operands[i]
        if t is not None:
            of[i] = metadata(names[i], t.reshape(rows, t.shape[-1]))
    shape, normed = tuple(x.shape), shift is not None

    def run_it(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        x, given = tensors[0], iter(tensors)
        x_new = x.new_empty(shape)
        h = x.new_empty(shape) if normed else x.new_empty(0)
        arguments = [None if m is None else (next(given).data_ptr(), *m) for m in of]
        if rows and width:
            call(x_new.data_ptr(), h.data_ptr(), *arguments, run, eps)
        return x_new, h

    return run_it
