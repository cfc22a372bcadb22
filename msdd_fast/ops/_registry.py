"""How an op chooses its backend, and how its implementations are registered with PyTorch.

An op is a plain eager function, which autograd and Inductor see through, and any number of implementations for
inference, one per backend. Each is registered as ``torch.ops.msdd_fast.<op>.<backend>`` with a fake function, so that
``torch.compile(fullgraph=True)`` works; its backward raises. An implementation that consists of differentiable PyTorch
functions is not registered: it stays a plain function, as the eager one, and is preferred to it where a gradient is
needed.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from msdd_fast import profiling
from msdd_fast.backends.choice import Backend, Verdict, backend_names, register_op, requested_backend
from msdd_fast.errors import BackendUnavailableError, InputError

_LIBRARY = torch.library.Library("msdd_fast", "DEF")
_log = logging.getLogger("msdd_fast.ops")
_logged: set[tuple[str, str]] = set()
_ops: dict[str, Op] = {}

Observer = Callable[["Op", str, tuple[Any, ...]], None]
_observers: ContextVar[tuple[Observer, ...]] = ContextVar("msdd_fast_observers", default=())


@contextmanager
def observe(observer: Observer) -> Iterator[None]:
    """Call ``observer(op, chosen backend, arguments)`` for every op that runs inside the ``with`` block.

    In this context only (``contextvars``), as ``use_backend``; not under torch.compile.
    """
    token = _observers.set((*_observers.get(), observer))
    try:
        yield
    finally:
        _observers.reset(token)


@dataclass(frozen=True)
class Implementation:
    """One backend of one op.

    Attributes:
        can_use: takes the op's arguments and answers (ok, reason) from their metadata alone.
        function: does the work.
        overload: the same as an operator that PyTorch knows; ``function`` if it is differentiable.
        prepare: see ``Op.register``.
    """

    can_use: Callable[..., Verdict]
    function: Callable[..., Any]
    overload: Callable[..., Any]
    differentiable: bool = False
    prepare: Callable[..., Callable[..., Any] | None] | None = None


class Op:
    """A named op.

    Args:
        name: stem of its files and its name in ``torch.ops.msdd_fast``.
        schema: arguments and result in PyTorch's schema language, "(Tensor x, ...) -> Tensor".
        eager: the reference; same arguments.
        fake: an uninitialised result for the same arguments.
        example: small arguments of the public function, the same at every call, no tensor twice. Tests and the
            benchmark of a call's cost use them. Tensors are on the CPU, of shapes that every implementation takes.
        fastest: the backend that measured fastest for the same arguments, which "auto" tries first; None if unknown.
        reads_offsets: whether implementations for GPUs also ask where in its storage a tensor begins.
    """

    def __init__(
        self,
        name: str,
        schema: str,
        eager: Callable[..., Any],
        fake: Callable[..., Any],
        example: Callable[[], tuple[Any, ...]],
        fastest: Callable[..., str | None] = lambda *_: None,
        reads_offsets: bool = False,
    ) -> None:
        self.name, self.schema, self.eager, self.fake, self.example = name, schema, eager, fake, example
        self.fastest, self.reads_offsets = fastest, reads_offsets
        self.implementations: dict[str, Implementation] = {}
        _ops[name] = self
        register_op(name)

    def register(
        self,
        backend: Backend,
        function: Callable[..., Any],
        fits: Callable[..., Verdict] | None = None,
        *,
        differentiable: bool = False,
        prepare: Callable[..., Callable[..., Any] | None] | None = None,
    ) -> None:
        """Add an implementation. "auto" tries them in the order in which they were added, then eager.

        Args:
            backend: must be able to use the first argument.
            function: takes the op's arguments.
            fits: the implementation's own limits: takes the op's arguments and answers (ok, reason) from metadata.
            differentiable: ``function`` consists of differentiable PyTorch functions.
            prepare: takes the op's arguments and returns a faster function of the tensors among them, in order, that is
                right for all tensors with the same metadata; or None.
        """

        def can_use(*args: Any) -> Verdict:
            verdict = backend.can_use(args[0])
            return verdict if fits is None or not verdict[0] else all_of(verdict, fits(*args))

        if differentiable:  # PyTorch's own functions: they guard themselves
            self.implementations[backend.name] = Implementation(can_use, function, function, True)
            return
        function = on_its_device(function)
        overload_name = backend.name.replace("-", "_")  # the schema language has no hyphens
        qualified = f"{self.name}.{overload_name}"
        _LIBRARY.define(qualified + self.schema)
        _LIBRARY.impl(qualified, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"msdd_fast::{qualified}", self.fake, lib=_LIBRARY)
        torch.library.register_autograd(f"msdd_fast::{qualified}", self._refuse_backward(backend.name), lib=_LIBRARY)
        overload = getattr(getattr(torch.ops.msdd_fast, self.name), overload_name)
        self.implementations[backend.name] = Implementation(can_use, function, overload, prepare=prepare)

    def __call__(self, *args: Any, backend: str | None = None) -> Any:
        """Run on the backend of the argument, else of ``use_backend``, else of MSDD_FAST_BACKEND, else the best."""
        chosen = self.select(*args, backend=backend)
        if not torch.compiler.is_compiling():
            for observer in _observers.get():
                observer(self, chosen, args)
        if chosen == "eager":
            return self.eager(*args)
        implementation = self.implementations[chosen]
        run = implementation.function if can_bypass_dispatcher(args) else implementation.overload
        if not profiling.enabled():
            return run(*args)
        with profiling.range(f"{self.name} [{chosen}]"):
            return run(*args)

    def select(self, *args: Any, backend: str | None = None) -> str:
        """Name of the backend that would run. Raises BackendUnavailableError for a named one that cannot."""
        name = requested_backend(self.name, backend, self.implementations)
        if name == "eager":
            return name
        # torch.jit.trace takes overloads of one op for another, since their schemas are the same: plain PyTorch only.
        traced = _tracing_state() is not None
        needs_grad = traced or _needs_grad(args)
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
        if traced and not differentiable:
            raise InputError(f"{self.name}: torch.jit.trace cannot record backend {name!r}; use 'eager' or 'auto'")
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
        """(backend, usable, reason) for every backend that exists, in order of preference."""
        rows = [(name, *implementation.can_use(*args)) for name, implementation in self.implementations.items()]
        rows += [
            (b, False, f"{self.name} has no such implementation")
            for b in backend_names()
            if b not in self.implementations
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


def on_its_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, run with the GPU of its first argument as the current one.

    Triton launches on the current device, whichever its tensors are on. This is the one guard for all kernels.
    """

    @functools.wraps(function)
    def run(*args: Any) -> Any:
        first = args[0]
        if not first.is_cuda or first.device.index == torch.cuda.current_device():
            return function(*args)
        with torch.cuda.device(first.device):
            return function(*args)

    return run


def get_op(name: str) -> Op:
    """The op of a name, to register an implementation with. Raises InputError that lists the names."""
    if name not in _ops:
        raise InputError(f"there is no op {name!r}; known: {', '.join(sorted(_ops))}")
    return _ops[name]


def all_of(*verdicts: Verdict) -> Verdict:
    """The first refusal, else the first verdict."""
    return next((v for v in verdicts if not v[0]), verdicts[0])


def is_observed() -> bool:
    """Whether a call must go through ``Op``: an observer, a tracer, a mode or a profiler has to see it."""
    traced = _is_compiling() or _tracing_state() is not None or _modes() > 0  # _is_traced(), at less cost
    return traced or profiling.enabled() or bool(_observers.get())


def can_bypass_dispatcher(args: tuple[Any, ...]) -> bool:
    """Whether no tracer, mode, transform or tensor subclass has to see an operator, and no lazy negation is pending.

    Then the function is called directly: on a CPU, a call through the dispatcher costs more than a small op. This is
    the one place that decides it.
    """
    return (
        not _is_traced()
        and torch._C._functorch.peek_interpreter_stack() is None
        and not _needs_grad(args)
        and all(type(a) in _PLAIN and not a.is_neg() for a in args if isinstance(a, Tensor))
    )


def _is_traced() -> bool:
    """torch.compile or torch.export, torch.jit.trace, or a dispatch mode (FakeTensorMode, make_fx, counters)."""
    return _is_compiling() or _tracing_state() is not None or _modes() > 0


_is_compiling, _modes = torch.compiler.is_compiling, torch._C._len_torch_dispatch_stack
_tracing_state = torch._C._get_tracing_state
_PLAIN = (Tensor, torch.nn.Parameter)


def _needs_grad(args: tuple[Any, ...]) -> bool:
    return torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args)
