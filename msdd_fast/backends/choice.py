"""Which backends there are, which one is asked for, what can run here, and why the rest cannot.

The compiled extension is looked for on first request, never when the package is imported, and the outcome is kept: a
broken or missing build disturbs nobody who does not ask for it, and everybody who asks hears the reason.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Container, Iterator
from contextlib import contextmanager

from msdd_fast.errors import InputError

BACKENDS = ("auto", "eager", "cpu", "triton", "cuda", "sdpa", "flash-attn", "xformers")


def parse_choice(text: str) -> dict[str, str]:
    """ "triton" or "eager,renoise_upsample=triton": backend of each op; "*" is the rest. Raises InputError."""
    choice = {}
    for part in text.split(","):
        op, _, backend = part.rpartition("=")
        if backend not in BACKENDS:
            raise InputError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
        choice[op or "*"] = backend
    return choice


def check_ops(choice: dict[str, str], known: Collection[str]) -> None:
    """Raise InputError if a backend is chosen for an op that does not exist."""
    for op in choice:
        if op != "*" and op not in known:
            raise InputError(f"backend is chosen for the op {op!r}; known: {', '.join(sorted(known))}")


def environment_choice() -> dict[str, str]:
    """The choice of MSDD_FAST_BACKEND. Raises InputError that names the variable."""
    try:
        return parse_choice(os.environ.get("MSDD_FAST_BACKEND") or "auto")
    except InputError as e:
        raise InputError(f"MSDD_FAST_BACKEND: {e}") from e


# Plain process-wide data: torch.compile guards on it, which it cannot do for a context variable.
_choice: dict[str, str] = environment_choice()


@contextmanager
def use_backend(text: str) -> Iterator[None]:
    """Choose backends inside a ``with`` block, for the whole process: "triton", "eager,renoise_upsample=cpu".

    The block's choice replaces the one outside it, MSDD_FAST_BACKEND's too. A backend named for one op never falls
    back. One named for all ops applies to those that have it; the others take the best they can. Raises InputError
    for an unknown backend or op.
    """
    from msdd_fast import ops

    choice = parse_choice(text)
    check_ops(choice, ops.__all__)
    before = dict(_choice)
    _choice.clear()
    _choice.update(choice)
    try:
        yield
    finally:
        _choice.clear()
        _choice.update(before)


def requested_backend(op: str, argument: str | None, available: Container[str]) -> str:
    """What is asked for: the argument, else ``use_backend`` or MSDD_FAST_BACKEND, else "auto"."""
    if argument is not None:
        if argument not in BACKENDS:
            raise InputError(f"backend must be one of {', '.join(BACKENDS)}, got {argument!r}")
        return argument
    if op in _choice:
        return _choice[op]
    common = _choice.get("*", "auto")
    return common if common == "eager" or common in available else "auto"
