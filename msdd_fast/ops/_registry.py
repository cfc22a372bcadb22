"""How an op chooses its backend and how its implementations are registered with PyTorch.

An op is a plain eager function, which autograd and Inductor see through, and any number of named implementations for
inference. Each implementation is registered as ``torch.ops.msdd_fast.<op>.<backend>`` (define, impl, fake), so that
``torch.compile(fullgraph=True)`` and CUDA graphs hold; its backward raises. One that is made of differentiable PyTorch
functions needs none of this: it stays a plain function like eager, and goes before it when a gradient is needed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from msdd_fast import profiling as ranges
from msdd_fast.backends.choice import BACKENDS, requested_backend
from msdd_fast.errors import BackendUnavailableError, InputError

Verdict = tuple[bool, str]

_LIBRARY = torch.library.Library("msdd_fast", "DEF")
_log = logging.getLogger("msdd_fast.ops")
_logged: set[tuple[str, str]] = set()
Observer = Callable[["Op", str, tuple[Any, ...]], None]
_observers: list[Observer] = []


@contextmanager
def observe(observer: Observer) -> Iterator[None]:
    """Call ``observer(op, chosen backend, arguments)`` for every op that runs inside the ``with`` block.

    For the whole process, as ``use_backend``; not under torch.compile.
    """
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)


@dataclass(frozen=True)
class Implementation:
    """One backend of one op. ``can_use`` takes the op's arguments and answers (ok, reason) from metadata alone.

    ``function`` does the work; ``overload`` is the same as an operator that PyTorch knows.
    """

    can_use: Callable[..., Verdict]
    function: Callable[..., Any]
    overload: Callable[..., Any]
    differentiable: bool = False


class Op:
    """A named op.

    Args:
        name: stem of its files and its name in ``torch.ops.msdd_fast``.
        schema: arguments and result in PyTorch's schema language, "(Tensor x, ...) -> Tensor".
        eager: the reference; same arguments.
        fake: result's metadata for the same arguments.
        fastest: backend that measured fastest for the same arguments, which ``auto`` tries first; None if unknown.
    """

    def __init__(
        self,
        name: str,
        schema: str,
        eager: Callable[..., Any],
        fake: Callable[..., Any],
        fastest: Callable[..., str | None] = lambda *_: None,
    ) -> None:
        self.name, self.schema, self.eager, self.fake, self.fastest = name, schema, eager, fake, fastest
        self.implementations: dict[str, Implementation] = {}

    def register(
        self, backend: str, function: Callable[..., Any], can_use: Callable[..., Verdict], differentiable: bool = False
    ) -> None:
        """Add an implementation; ``auto`` tries them in the order in which they were added, then eager.

        "cpu" comes before "triton": on a CPU tensor Triton means its interpreter, which is for tests.
        """
        if differentiable:
            self.implementations[backend] = Implementation(can_use, function, function, True)
            return
        overload_name = backend.replace("-", "_")  # the schema language knows no hyphens
        qualified = f"{self.name}.{overload_name}"
        _LIBRARY.define(qualified + self.schema)
        _LIBRARY.impl(qualified, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"msdd_fast::{qualified}", self.fake, lib=_LIBRARY)
        torch.library.register_autograd(f"msdd_fast::{qualified}", self._refuse_backward(backend), lib=_LIBRARY)
        overload = getattr(getattr(torch.ops.msdd_fast, self.name), overload_name)
        self.implementations[backend] = Implementation(can_use, function, overload)

    def __call__(self, *args: Any, backend: str | None = None) -> Any:
        """Run on the backend of the argument, else of ``use_backend``, else of MSDD_FAST_BACKEND, else the best."""
        chosen = self.select(*args, backend=backend)
        if _observers:
            for observer in _observers:
                observer(self, chosen, args)
        if chosen == "eager":
            return self.eager(*args)
        implementation = self.implementations[chosen]
        run = implementation.function if _nobody_watches(args) else implementation.overload
        if not ranges.on():
            return run(*args)
        with ranges.span(f"{self.name} [{chosen}]"):
            return run(*args)

    def select(self, *args: Any, backend: str | None = None) -> str:
        """Name of the backend that would run. Raises BackendUnavailableError for a named one that cannot."""
        name = requested_backend(self.name, backend, self.implementations)
        if name == "eager":
            return name
        needs_grad = _needs_grad(args)
        if name == "auto":
            first = self.fastest(*args)
            for candidate in sorted(self.implementations, key=lambda b: b != first):
                implementation = self.implementations[candidate]
                if needs_grad and not implementation.differentiable:
                    continue
                ok, reason = implementation.can_use(*args)
                if ok:
                    self._log_once(candidate)
                    return candidate
                self._log_once(f"not {candidate} ({reason})")
            return "eager"
        known = name in self.implementations
        differentiable = known and self.implementations[name].differentiable
        if needs_grad and not differentiable and not torch.compiler.is_compiling():
            raise InputError(
                f"{self.name}: backend {name!r} is for inference, but an argument requires grad; "
                "use backend='eager' or 'auto', or torch.no_grad()"
            )
        if not known or not self.implementations[name].can_use(*args)[0]:
            lines = "; ".join(f"{b}: {'ok' if ok else why}" for b, ok, why in self.explain(*args))
            raise BackendUnavailableError(f"{self.name}: backend {name!r} cannot run this call. {lines}")
        return name

    def explain(self, *args: Any) -> list[tuple[str, bool, str]]:
        """(backend, usable, reason) for every backend that there is, in the order of preference."""
        rows = [(name, *implementation.can_use(*args)) for name, implementation in self.implementations.items()]
        rows += [
            (b, False, f"{self.name} has no such implementation") for b in BACKENDS if b not in self.implementations
        ]
        return [r for r in rows if r[0] not in ("auto", "eager")] + [("eager", True, "plain PyTorch")]

    def _refuse_backward(self, backend: str) -> Callable[..., Any]:
        def backward(ctx: Any, *grads: Tensor) -> Any:
            raise InputError(
                f"{self.name}: backend {backend!r} is for inference and has no backward; use backend='eager'"
            )

        return backward

    def _log_once(self, message: str) -> None:
        if not torch.compiler.is_compiling() and (self.name, message) not in _logged:
            _logged.add((self.name, message))
            _log.info("%s: %s", self.name, message)


def _nobody_watches(args: tuple[Any, ...]) -> bool:
    """Whether only the work counts: no tracing, mode, transform or tensor subclass has to see an operator.

    Then the function is called directly: the way through the dispatcher costs more than a small op on a CPU.
    """
    return (
        not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and not _needs_grad(args)
        and all(type(a) in _PLAIN for a in args if isinstance(a, Tensor))
    )


_PLAIN = (Tensor, torch.nn.Parameter)


def both(first: Verdict, second: Verdict) -> Verdict:
    """The first verdict unless the second alone is no."""
    return first if second[0] or not first[0] else second


def _needs_grad(args: tuple[Any, ...]) -> bool:
    return torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args)
