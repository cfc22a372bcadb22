"""Count the kernels that a call would launch on a GPU, and the bytes they touch.

Every operator that reaches the device and is not a view counts as one launch, and touches each of its tensor arguments
and results once. A library call that launches several kernels counts as one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, register_flop_formula

# Allocation and metadata only.
NO_KERNEL = {"empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "resolve_conj", "resolve_neg"}

PACKED_LINEAR = "mkldnn::_linear_pointwise"  # of weights that oneDNN packed: msdd_fast/layers/linear/dense.py


def _packed_linear_flops(x: Any, weight: Any, *_: Any, **__: Any) -> int:
    """FLOP of rows x (..., in) and a weight (out, in), by their shapes."""
    return 2 * math.prod(x) * int(weight[0])


# torch's counter does not know this operator, and not every build of torch has it.
if hasattr(torch.ops.mkldnn, "_linear_pointwise") and torch.ops.mkldnn._linear_pointwise not in flop_registry:
    register_flop_formula(torch.ops.mkldnn._linear_pointwise)(_packed_linear_flops)


class LaunchCounter(TorchDispatchMode):
    """Counts while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.launches, self.bytes = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view and func.overloadpacket.__name__.removesuffix("_") not in NO_KERNEL:
            self.launches += 1
            self.bytes += touched_bytes(args, kwargs, out)
        return out


def touched_bytes(args: Any, kwargs: Any, out: Any) -> int:
    """Bytes of all tensors of one call, each counted once: an argument may be returned (out=, in place)."""
    tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
    regions = {(_place(t), _elements(t), t.element_size()) for t in tensors}
    return sum(elements * itemsize for _, elements, itemsize in regions)


def _place(t: Tensor) -> int:
    """Identity of the memory; weights packed by oneDNN expose no storage."""
    return t.data_ptr() if t.layout == torch.strided else id(t)


def _elements(t: Tensor) -> int:
    """Distinct elements: an expanded dimension is read from the cache."""
    if t.layout != torch.strided:
        return t.numel()
    return math.prod(size for size, stride in zip(t.shape, t.stride(), strict=True) if stride)


def count_launches(run: Callable[[], Any]) -> tuple[int, int]:
    """(launches, bytes) of one call."""
    with LaunchCounter() as counter, torch.no_grad():
        run()
    return counter.launches, counter.bytes
