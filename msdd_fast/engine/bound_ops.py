"""The ops with one engine's choice of backends: engines that choose differently do not disturb each other."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

from msdd_fast import ops
from msdd_fast.backends.choice import Choice, check_ops, parse_choice
from msdd_fast.ops import get_op


def bind(backend: str) -> SimpleNamespace:
    """Every op of ``msdd_fast.ops`` as an attribute, with ``backend`` ("triton", "eager,attention=sdpa") fixed.

    "auto" leaves the choice to ``use_backend`` and MSDD_FAST_BACKEND. A backend that is named for all ops applies to
    those that have it. Raises InputError for an unknown backend or op.
    """
    choice = parse_choice(backend)
    check_ops(choice)
    return SimpleNamespace(**{name: partial(getattr(ops, name), backend=_for(name, choice)) for name in ops.__all__})


def _for(name: str, choice: Choice) -> str | None:
    """None leaves the choice to ``use_backend`` and MSDD_FAST_BACKEND."""
    if name not in choice.by_op and choice.by_op.get("*", "auto") == "auto":
        return None
    wanted = choice.for_op(name, get_op(name).implementations)
    return None if wanted == "auto" and name not in choice.by_op else wanted
