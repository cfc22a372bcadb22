"""Functions that ``torch.compile`` calls once, while it traces, and whose answer it keeps."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

F = TypeVar("F", bound=Callable[..., object])


def constant_when_compiled(function: F) -> F:
    """``torch.compiler.assume_constant_result`` without its import of all of Dynamo, and of Triton with it."""
    vars(function)["_dynamo_marked_constant"] = True
    return function
