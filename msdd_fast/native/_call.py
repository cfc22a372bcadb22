"""How tensors are handed to the extension: as addresses, with dtype, shape and strides.

A native function has two parts. ``prepare`` reads all metadata once and returns a function of the tensors alone, which
is right for all tensors with the same metadata: an engine keeps it (engine/bound_ops.py). Calling the native function
does both.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, Generic, ParamSpec, TypeVar

import torch
from torch import Tensor

from msdd_fast.backends.extension import load_extension
from msdd_fast.errors import InputError

P = ParamSpec("P")
R = TypeVar("R")

_address = Tensor.data_ptr  # mapped over tensors, which is faster than calling the method of each

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as in csrc/include/msdd_fast/dtype.h
PIXEL_TYPES = {**DTYPES, torch.uint8: 3}  # as in csrc/include/msdd_fast/detail/pixels.h

Metadata = tuple[int, tuple[int, ...], tuple[int, ...]]
"""Code of the dtype, shape, strides. An operand of the extension is (address, *metadata), or None if it is absent."""


class Native(Generic[P, R]):
    """A native function, made from its ``prepare``."""

    def __init__(self, prepare: Callable[P, Callable[..., R]]) -> None:
        self.prepare = prepare
        functools.update_wrapper(self, prepare)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Raises InputError for what the extension refuses, BackendUnavailableError if it is missing."""
        if kwargs:
            bound = inspect.signature(self.prepare).bind(*args, **kwargs)
            bound.apply_defaults()
            args, kwargs = bound.args, {}  # type: ignore[assignment]
        return self.prepare(*args, **kwargs)(*(a for a in args if isinstance(a, Tensor)))


def in_order(
    name: str, operands: Sequence[str], results: Callable[..., Tensor | tuple[Tensor, ...]]
) -> Native[..., Any]:
    """A function of the extension that takes the addresses of its results, then the arguments, as a native function.

    Args:
        name: of the function.
        operands: names of the arguments that are tensors or None, in order. The others follow and are passed on as
            they are.
        results: takes the same arguments and returns uninitialised results, contiguous, each of the dtype of one of the
            operands. If none of them has an element, nothing is called.
    """

    def prepare(*args: Any) -> Callable[..., Any]:
        function, threads = getattr(load_extension(), name), torch.get_num_threads
        numbers = args[len(operands) :]
        of = [optional_metadata(operand, t) for operand, t in zip(operands, args, strict=False)]
        given = [t for t in args if isinstance(t, Tensor)]
        made = results(*args)
        several = isinstance(made, tuple)
        all_made = made if isinstance(made, tuple) else (made,)
        makers = [_maker(r, given) for r in all_made]
        empty = not any(r.numel() for r in all_made)
        codes, shapes, strides = zip(*(m for m in of if m is not None), strict=True)
        absent = [i for i, m in enumerate(of) if m is None]

        def run(*tensors: Tensor) -> Any:
            made = [make(tensors[i]) for i, make in makers]
            if not empty:
                operands: list[Any] = list(zip(map(_address, tensors), codes, shapes, strides, strict=True))
                for i in absent:
                    operands.insert(i, None)
                try:  # as ``entry`` does: one call of a function less
                    function(*map(_address, made), *operands, *numbers, threads())
                except ValueError as error:
                    raise refused(name, error) from None
            return tuple(made) if several else made[0]

        return run

    return Native(prepare)


def _maker(result: Tensor, given: Sequence[Tensor]) -> tuple[int, Callable[[Tensor], Tensor]]:
    """From which of the tensors to make an uninitialised one like ``result``, and how: ``empty_like`` takes least."""
    for i, t in enumerate(given):
        if t.dtype == result.dtype and t.shape == result.shape and t.is_contiguous():
            return i, torch.empty_like
    shape = tuple(result.shape)
    return [t.dtype for t in given].index(result.dtype), lambda t: t.new_empty(shape)


def entry(name: str) -> Callable[..., None]:
    """A function of the extension, on as many threads as torch uses. What it refuses becomes an InputError."""
    function, threads = getattr(load_extension(), name), torch.get_num_threads

    def call(*args: Any) -> None:
        try:
            function(*args, threads())
        except ValueError as error:
            raise refused(name, error) from None

    return call


def refused(name: str, error: ValueError) -> InputError:
    """What the extension's function ``name`` refused."""
    return InputError(f"{name}: {error}")


def metadata(name: str, x: Tensor) -> Metadata:
    """Of a CPU tensor of a dtype that the extension knows: it sees an address, not the device. Raises InputError."""
    if not isinstance(x, Tensor) or x.device.type != "cpu" or x.dtype not in DTYPES:
        got = f"{x.dtype} on {x.device}" if isinstance(x, Tensor) else type(x).__name__
        raise InputError(f"{name} must be a float32, bfloat16 or float16 tensor on the CPU, got {got}")
    if x.layout != torch.strided or x.is_nested:
        raise InputError(f"{name} must be a dense tensor, got the layout {x.layout}")
    if x.is_neg():
        raise InputError(f"{name} must hold its own values, got a lazy negation: use resolve_neg()")
    return DTYPES[x.dtype], tuple(x.shape), x.stride()


def optional_metadata(name: str, x: Tensor | None) -> Metadata | None:
    """The same, None for None."""
    return None if x is None else metadata(name, x)


def dense_layout(
    shape: Sequence[int], order: torch.memory_format = torch.contiguous_format
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(shape, strides), for ``new_empty_strided``, the fastest way to make a result."""
    return tuple(shape), torch.empty(tuple(shape), device="meta", memory_format=order).stride()


def operand(x: Tensor) -> tuple[int, int, tuple[int, ...], tuple[int, ...]]:
    """A tensor as the extension takes it."""
    return x.data_ptr(), *metadata("x", x)


def check_scalars(**scalars: Tensor | None) -> None:
    """Float32 tensors of one element on the CPU, which the extension reads at their address. Raises InputError."""
    for name, x in scalars.items():
        if x is not None and (x.dtype != torch.float32 or x.numel() != 1 or x.device.type != "cpu"):
            raise InputError(f"{name} must be one float32 on the CPU, got {x.dtype} {tuple(x.shape)} on {x.device}")


def check_seeds(seeds: Tensor) -> int:
    """The number of seeds, int64 (B,) on the CPU and contiguous. Raises InputError for anything else."""
    if not isinstance(seeds, Tensor) or seeds.dtype != torch.int64 or seeds.ndim != 1 or seeds.device.type != "cpu":
        is_tensor = isinstance(seeds, Tensor)
        got = f"{seeds.dtype} {tuple(seeds.shape)} on {seeds.device}" if is_tensor else type(seeds).__name__
        raise InputError(f"seeds must be an int64 tensor (B,) on the CPU, got {got}")
    if not seeds.is_contiguous():
        raise InputError(f"seeds must be contiguous, got strides {seeds.stride()}")
    return len(seeds)
