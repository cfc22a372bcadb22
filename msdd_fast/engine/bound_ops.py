"""The ops of one engine, with the backends that it was built for.

The first call of an op with arguments of some kind goes through the op: it checks the arguments and chooses a backend.
Later calls of the same kind repeat that decision without making it again. A kind is everything that a decision depends
on: the arguments that are not tensors, and of every tensor the type, dtype, device, shape, strides, whether it requires
grad, and what dispatches on it (subclasses, modes, transforms, autocast). Values of tensors are no part of it: seeds
are checked where they enter (``resolve_seeds``).
"""

from __future__ import annotations

from collections.abc import Callable
from operator import itemgetter
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from msdd_fast import ops
from msdd_fast.backends.choice import Choice, check_ops, choice_of_context, parse_choice
from msdd_fast.ops import Ops
from msdd_fast.ops._registry import Op, can_bypass_dispatcher, get_op, is_observed, observe

try:
    from torch._C._dynamo import guards
except ImportError:  # then every call decides anew
    guards = None  # type: ignore[assignment]

MAX_PLANS = 4096  # of one op: then it starts over
MAX_PLANS_OF_A_SHAPE = 8
_STATIC = (int, float, bool, str, tuple, torch.dtype, type(None))


def bind(backend: str) -> Ops:
    """Every op of ``msdd_fast.ops`` as an attribute, with ``backend`` ("triton", "eager,attention=sdpa") fixed.

    "auto" leaves the choice to ``use_backend`` and MSDD_FAST_BACKEND. A backend that is named for all ops applies to
    those that have it. Raises InputError for an unknown backend or op.
    """
    choice = parse_choice(backend)
    check_ops(choice)
    bound = {name: BoundOp(getattr(ops, name), _backend_of(name, choice)) for name in ops.__all__}
    return cast(Ops, SimpleNamespace(**bound))


def _backend_of(name: str, choice: Choice) -> str | None:
    """None leaves the choice to ``use_backend`` and MSDD_FAST_BACKEND."""
    if name in choice.by_op:
        return choice.by_op[name]
    wanted = choice.for_op(name, get_op(name).implementations)
    return None if wanted == "auto" else wanted


class Plan(NamedTuple):
    """A decision: ``run(*tensors)`` does the op for tensors that ``matches(*tensors)``."""

    matches: Callable[..., bool]
    run: Callable[..., Any]


class Kind:
    """Calls whose arguments have the same types: which are tensors, and the plans made for them so far."""

    def __init__(self, types: tuple[type, ...]) -> None:
        tensors = [i for i, t in enumerate(types) if t is Tensor]
        others = [i for i, t in enumerate(types) if t is not Tensor]
        self.tensors, self.others = _picker(tensors), _picker(others)
        self.plans: dict[Any, tuple[Plan, ...]] = {}


def _picker(positions: list[int]) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
    """A function that picks these positions of a tuple, as a tuple."""
    if len(positions) > 1:
        return itemgetter(*positions)
    return itemgetter(slice(positions[0], positions[0] + 1) if positions else slice(0, 0))


class BoundOp:
    """One op with its backend fixed."""

    def __init__(self, function: Callable[..., Any], backend: str | None) -> None:
        self.function, self.backend = function, backend
        self._kinds: dict[tuple[type, ...], Kind] = {}

    def __call__(self, *args: Any, **options: Any) -> Any:
        if options or is_observed():
            return self.function(*args, backend=self.backend, **options)
        kind = self._kinds.get(tuple(map(type, args)))
        if kind is None:
            return self._decide(args)
        tensors = kind.tensors(args)
        for plan in kind.plans.get((tensors[0].shape, kind.others(args), choice_of_context()), ()):
            matches, run = plan
            if matches(*tensors):
                return run(*tensors)
        return self._decide(args)

    def _decide(self, args: tuple[Any, ...]) -> Any:
        """Call the op, and keep its decision if that is all that another call needs."""
        decisions: list[tuple[Op, str, tuple[Any, ...]]] = []
        with observe(lambda *decision: decisions.append(decision)):
            result = self.function(*args, backend=self.backend)
        if len(decisions) == 1 and guards is not None:
            self._keep(args, *decisions[0])
        return result

    def _keep(self, args: tuple[Any, ...], op: Op, backend: str, op_args: tuple[Any, ...]) -> None:
        types = tuple(map(type, args))
        plan = _plan(args, op, backend, op_args)
        if plan is None or types[0] is not Tensor or any(t is not Tensor and t not in _STATIC for t in types):
            return
        kind = self._kinds.setdefault(types, Kind(types))
        key = (args[0].shape, kind.others(args), choice_of_context())
        if len(kind.plans) >= MAX_PLANS:
            kind.plans.clear()
        kind.plans[key] = (plan, *kind.plans.get(key, ()))[:MAX_PLANS_OF_A_SHAPE]


def _plan(args: tuple[Any, ...], op: Op, backend: str, op_args: tuple[Any, ...]) -> Plan | None:
    """What a call with ``args`` led to; None if more than its tensors' metadata decided, or something else must see it.

    An op hands its tensors on as they are, unless it had to convert one: then nothing is kept.
    """
    tensors = tuple(a for a in op_args if isinstance(a, Tensor))
    given = tuple(a for a in args if isinstance(a, Tensor))
    same = len(tensors) == len(given) and all(a is b for a, b in zip(tensors, given, strict=True))
    if not same or not can_bypass_dispatcher(op_args) or (op.reads_offsets and tensors[0].device.type != "cpu"):
        return None
    run = None
    implementation = op.implementations.get(backend)
    if implementation is not None and implementation.prepare is not None:
        run = implementation.prepare(*op_args)
    if run is None:
        run = _with_tensors(op.eager if implementation is None else implementation.function, op_args)
    matches = guards.TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None).check
    return Plan(matches, run) if matches(*tensors) else None  # not if one tensor is given twice


def _with_tensors(function: Callable[..., Any], args: tuple[Any, ...]) -> Callable[..., Any]:
    """``function`` with these arguments, as a function of the tensors among them."""
    places = [i for i, a in enumerate(args) if isinstance(a, Tensor)]
    template = [None if isinstance(a, Tensor) else a for a in args]

    def run(*tensors: Tensor) -> Any:
        filled = template.copy()
        for i, t in zip(places, tensors, strict=True):
            filled[i] = t
        return function(*filled)

    return run
