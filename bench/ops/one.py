"""One op alone, with the inputs of its benchmark: what ``msdd-fast profile --op`` runs."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch

from msdd_fast.bench.ops.suite import Case
from msdd_fast.errors import InputError


def one_op(name: str, case: Case, backend: str | None) -> Callable[[], Any]:
    """A call of one op with the inputs that its benchmark makes. Raises InputError for an unknown op."""
    from msdd_fast import ops

    if name not in ops.__all__:
        raise InputError(f"--op must be one of {', '.join(ops.__all__)}, got {name!r}")
    module = importlib.import_module(f"msdd_fast.bench.ops.test_{name}")
    calls: list[Callable[[], Any]] = []

    def capture(op: Callable[..., Any], inputs: Sequence[Any], *_: Any, **__: Any) -> None:
        calls.append(lambda: op(*inputs, backend=backend))

    torch.manual_seed(0)
    for test_name, test in vars(module).items():
        if test_name.startswith("test_") and list(inspect.signature(test).parameters) == ["case", "measure"]:
            test(case, capture)
    return calls[0]


def parse_shape(text: str) -> tuple[int, int]:
    """ "8x256": a batch of 8 at 256 px. Raises InputError."""
    batch, _, scale = text.partition("x")
    if not (batch.isdigit() and scale.isdigit() and int(batch) and int(scale)):
        raise InputError(f"--shape must be BATCHxPIXELS, such as 8x256, got {text!r}")
    return int(batch), int(scale)
