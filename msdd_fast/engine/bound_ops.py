"""The ops with one engine's choice of backends: engines that choose differently do not disturb each other."""

from __future__ import annotations

import importlib
from functools import partial
from types import SimpleNamespace

from msdd_fast import ops
from msdd_fast.backends.choice import check_ops, parse_choice


def bind(backend: str) -> SimpleNamespace:
    """Every op of ``msdd_fast.ops`` as an attribute, with ``backend`` ("triton", "eager,attention=sdpa") fixed.

    "auto" leaves the choice to ``use_backend`` and MSDD_FAST_BACKEND. A backend that is named for all ops applies to
    those that have it. Raises InputError for an unknown backend or op.
    """
    choice = parse_choice(backend)
    check_ops(choice, ops.__all__)
    return SimpleNamespace(**{name: partial(getattr(ops, name), backend=_for(name, choice)) for name in ops.__all__})


def _for(name: str, choice: dict[str, str]) -> str | None:
    if name in choice:
        return choice[name]
    common = choice.get("*", "auto")
    if common in ("auto", "eager"):
        return None if common == "auto" else common
    available = importlib.import_module(f"msdd_fast.ops.{name}").OP.implementations
    return common if common in available else None
