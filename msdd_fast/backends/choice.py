"""Which backends there are, and which one each op is asked to take.

A backend is a name and a predicate that says whether it can work on a tensor. Every module of this package that has one
registers it with ``register_backend``; yours may do the same. ``use_backend``, MSDD_FAST_BACKEND and the ``backend=``
argument of the ops and of ``accelerate`` take every name that is registered.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor

from msdd_fast.errors import InputError

Verdict = tuple[bool, str]
"""Whether something can be used, and what it is or why not."""

_RESERVED = ("auto", "eager")


@dataclass(eq=False)
class Backend:
    """A way to run ops.

    Attributes:
        name: what users ask for.
        can_use: whether the backend can work on a tensor, from its metadata alone.
    """

    name: str
    can_use: Callable[[Tensor], Verdict]


@dataclass(frozen=True, eq=False)
class Choice:
    """The backend asked for, by name of the op; "*" stands for all other ops. Compared and hashed by identity."""

    by_op: dict[str, str]

    def for_op(self, op: str, available: Container[str]) -> str:
        """The backend of one op. One that is named for all ops applies to those that have it, else it is "auto"."""
        if op in self.by_op:
            return self.by_op[op]
        common = self.by_op.get("*", "auto")
        return common if common == "eager" or common in available else "auto"


_backends: dict[str, Backend] = {}
_ops: set[str] = set()


def register_backend(name: str, can_use: Callable[[Tensor], Verdict]) -> Backend:
    """Make a backend known, and return it for ``Op.register``.

    Args:
        name: not yet registered, without "," and "=".
        can_use: takes the first tensor of a call and answers (ok, reason) from its metadata.

    Raises InputError for a name that is taken or cannot be written in a choice.
    """
    if not name or set(name) & set(",=*"):
        raise InputError(f"a backend's name must not be empty nor contain ',', '=' or '*', got {name!r}")
    if name in backend_names():
        raise InputError(f"the backend {name!r} is already registered")
    _backends[name] = Backend(name, can_use)
    return _backends[name]


def backend_names() -> tuple[str, ...]:
    """Everything that may be asked for: "auto", "eager" and the registered backends."""
    return (*_RESERVED, *_backends)


def register_op(name: str) -> None:
    """Make the name of an op known to ``check_ops``."""
    _ops.add(name)


def parse_choice(text: str) -> Choice:
    """Parse "triton" or "eager,renoise_upsample=triton". The same text gives the same object. Raises InputError."""
    _check_text(text)
    return _parse(text)


@functools.lru_cache(maxsize=64)
def _parse(text: str) -> Choice:
    by_op = {}
    for part in text.split(","):
        op, _, backend = part.rpartition("=")
        _check_backend(backend)
        by_op[op or "*"] = backend
    return Choice(by_op)


def check_ops(choice: Choice) -> None:
    """Raise InputError if ``choice`` names an op that does not exist."""
    for op in choice.by_op:
        if op != "*" and op not in _ops:
            raise InputError(f"backend is chosen for the op {op!r}; known: {', '.join(sorted(_ops))}")


def _check_text(text: object) -> None:
    if not isinstance(text, str):
        raise InputError(f"backend must be a name, or names per op ('auto,attention=sdpa'), got {type(text).__name__}")


def _check_backend(name: str) -> None:
    _check_text(name)
    if name not in _RESERVED and name not in _backends:
        raise InputError(f"backend must be one of {', '.join(backend_names())}, got {name!r}")


# --- The choice in force. ---


@dataclass(frozen=True, eq=False)
class _Scope:
    """One ``with use_backend(...)`` block."""

    choice: Choice


class _Traced(threading.local):
    """The choice of this thread for torch.compile, which can guard on an attribute but not on a context variable."""

    def __init__(self) -> None:
        self.choice: Choice | None = None


_scopes: ContextVar[tuple[_Scope, ...]] = ContextVar("msdd_fast_backends", default=())
_traced = _Traced()
_environment: Choice | None = None


def read_environment() -> Choice:
    """The choice of MSDD_FAST_BACKEND, read once. Raises InputError that names the variable."""
    global _environment
    if _environment is None:
        try:
            choice = parse_choice(os.environ.get("MSDD_FAST_BACKEND") or "auto")
            check_ops(choice)
        except InputError as e:
            raise InputError(f"MSDD_FAST_BACKEND: {e}") from e
        _environment = choice
    return _environment


def current_choice() -> Choice:
    """The choice of the innermost ``use_backend`` block, else of MSDD_FAST_BACKEND."""
    if torch.compiler.is_compiling():
        return _traced.choice or _environment or read_environment()
    return choice_of_context()


def choice_of_context() -> Choice:
    """``current_choice`` where torch.compile does not trace."""
    scopes = _scopes.get()
    return scopes[-1].choice if scopes else _environment or read_environment()


def is_automatic() -> bool:
    """Whether neither ``use_backend`` nor MSDD_FAST_BACKEND asks for a backend."""
    return all(backend == "auto" for backend in current_choice().by_op.values())


@contextmanager
def use_backend(text: str) -> Iterator[None]:
    """Choose backends inside a ``with`` block: "triton", "eager,renoise_upsample=cpu".

    The choice belongs to the current context (``contextvars``): other threads and asyncio tasks keep their own. It
    replaces that of an enclosing block and of MSDD_FAST_BACKEND. A backend named for one op never falls back. One named
    for all ops applies to those that have it; the others take the best they can. Blocks may end in any order, as they
    do in generators. Raises InputError for an unknown backend or op.
    """
    choice = parse_choice(text)
    check_ops(choice)
    scope = _Scope(choice)
    _enter((*_scopes.get(), scope))
    try:
        yield
    finally:
        _enter(tuple(s for s in _scopes.get() if s is not scope))


def _enter(scopes: tuple[_Scope, ...]) -> None:
    _scopes.set(scopes)
    _traced.choice = scopes[-1].choice if scopes else None


def requested_backend(op: str, argument: str | None, available: Container[str]) -> str:
    """The backend asked for: the argument, else that of ``current_choice``; "auto" leaves it to the op."""
    if argument is None:
        return current_choice().for_op(op, available)
    _check_backend(argument)
    return argument
