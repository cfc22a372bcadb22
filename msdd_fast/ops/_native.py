"""Native functions as implementations of ops."""

from __future__ import annotations

from collections.abc import Callable
from operator import itemgetter
from typing import Any

from torch import Tensor

from msdd_fast.backends.choice import Verdict
from msdd_fast.backends.cpu import CPU
from msdd_fast.native._call import Native
from msdd_fast.ops._registry import Op


def register_native(
    op: Op,
    native: Native[Any, Any],
    arrange: Callable[..., tuple[Any, ...]] | None = None,
    fits: Callable[..., Verdict] | None = None,
) -> None:
    """Register a native function as the backend "cpu" of ``op``.

    Args:
        native: the function.
        arrange: takes the op's arguments and returns those of ``native``, with tensors copied only if their layout does
            not fit. It may leave tensors out and change their order. Default: they are the same.
        fits: see ``Op.register``.
    """

    def run(*args: Any) -> Any:
        return native(*(args if arrange is None else arrange(*args)))

    def prepare(*args: Any) -> Callable[..., Any] | None:
        arranged = args if arrange is None else arrange(*args)
        ours, theirs = ([id(a) for a in x if isinstance(a, Tensor)] for x in (args, arranged))
        if not set(theirs) <= set(ours):
            return None  # something is copied first, at every call
        run = native.prepare(*arranged)
        if theirs == ours:
            return run
        places = [ours.index(t) for t in theirs]
        if len(places) == 1:
            return lambda *tensors: run(tensors[places[0]])
        pick = itemgetter(*places)
        return lambda *tensors: run(*pick(tensors))

    op.register(CPU, run, fits, prepare=prepare)
