"""How tensors are handed to the extension: as addresses, with dtype, shape and strides.

A native function has two parts. ``prepare`` reads all metadata once and returns a function of the tensors alone, which
is right for all tensors with the same metadata: an engine keeps it (engine/bound_ops.py). Calling the native function
does both.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

from msdd_fast.backends.extension import load_extension
from msdd_fast.errors import InputError

P = ParamSpec("P")
R = TypeVar("R")

_address = Tensor.data_ptr  # mapped over tensors, which is faster than calling the method of each

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as in csrc/include/msdd_fast/dtype.h
PIXEL_TYPES = {**DTYPES, torch.uint8: 3}  # as in csrc/include/msdd_fast/detail/pixels.h

GIVEN = 1
"""Stands for an address that a prepared function is given at every call; as in csrc/binding/tensor.h."""

Metadata = tuple[int, int, tuple[int, ...], tuple[int, ...]]
"""(GIVEN, code of the dtype, shape, strides), as the extension takes a tensor. None is an absent one."""


class Result(NamedTuple):
    """What a prepared function makes at every call: a tensor, dense in any order of the dimensions."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    def metadata(self) -> Metadata:
        """As the extension takes it, where it takes results with their layout."""
        return GIVEN, PIXEL_TYPES[self.dtype], self.shape, self.strides


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
    name: str, operands: Sequence[str], results: Callable[..., Tensor | tuple[Tensor, Tensor]]
) -> Native[..., Any]:
    """A function of the extension that takes the addresses of its results, then the arguments, as a native function.

    Args:
        name: of the function.
        operands: names of the arguments that are tensors or None, in order. The others follow and are passed on as
            they are.
        results: takes the same arguments and returns a tensor, or two, that lie as the results do. If none of them has
            an element, nothing is called.
    """

    def prepare(*args: Any) -> Callable[..., Any]:
        of = [optional_metadata(operand, t) for operand, t in zip(operands, args, strict=False)]
        arguments = *of, *args[len(operands) :]
        made = results(*args)
        if isinstance(made, tuple):
            return prepared(name, (result_like(made[0]), result_like(made[1])), GIVEN, GIVEN, *arguments)
        return prepared(name, result_like(made), GIVEN, *arguments)

    return Native(prepare)


def prepared(name: str, results: Result | tuple[Result, Result], *arguments: Any) -> Callable[..., Any]:
    """A function of tensors that makes new results, calls a function of the extension and returns them.

    Args:
        name: of the extension's function (csrc/binding/prepared.h). Its parameters with an address are in order: the
            results, then the tensors that are given at every call.
        results: one, or two. If none of them has an element, nothing is called.
        arguments: of the extension's function, without the number of threads: torch's at the time of a call.

    What the extension refuses becomes an InputError.
    """
    function = getattr(load_extension(), "prepare_" + name)(*arguments)
    return _one(name, function, results) if isinstance(results, Result) else _two(name, function, results)


def _one(name: str, function: Callable[..., None], result: Result) -> Callable[..., Tensor]:
    (shape, strides, dtype), threads, empty = result, torch.get_num_threads, 0 in result.shape

    def run(*tensors: Tensor) -> Tensor:
        first = tensors[0]
        if first.dtype is dtype:  # to name it takes longer
            out = first.new_empty_strided(shape, strides)
        else:
            out = first.new_empty_strided(shape, strides, dtype=dtype)
        if not empty:
            try:
                function(out.data_ptr(), *map(_address, tensors), threads())
            except ValueError as error:
                raise refused(name, error) from None
        return out

    return run


def _two(name: str, function: Callable[..., None], results: tuple[Result, Result]) -> Callable[..., Any]:
    (shape, strides, dtype), (other_shape, other_strides, other_dtype) = results
    threads, empty = torch.get_num_threads, all(0 in r.shape for r in results)

    def run(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        first = tensors[0]
        given = first.dtype
        if given is dtype and given is other_dtype:
            out, other = first.new_empty_strided(shape, strides), first.new_empty_strided(other_shape, other_strides)
        else:
            out = first.new_empty_strided(shape, strides, dtype=dtype)
            other = first.new_empty_strided(other_shape, other_strides, dtype=other_dtype)
        if not empty:
            try:
                function(out.data_ptr(), other.data_ptr(), *map(_address, tensors), threads())
            except ValueError as error:
                raise refused(name, error) from None
        return out, other

    return run


def prepared_into(name: str, *arguments: Any) -> Callable[..., Tensor]:
    """``prepared`` for a result that is given at every call, behind the other tensors."""
    function, threads = getattr(load_extension(), f"prepare_{name}")(*arguments), torch.get_num_threads

    def run(*tensors: Tensor) -> Tensor:
        *operands, out = map(_address, tensors)
        try:
            function(out, *operands, threads())
        except ValueError as error:
            raise refused(name, error) from None
        return tensors[-1]

    return run


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
    code = DTYPES.get(x.dtype) if isinstance(x, Tensor) and x.is_cpu else None
    if code is None:
        got = f"{x.dtype} on {x.device}" if isinstance(x, Tensor) else type(x).__name__
        raise InputError(f"{name} must be a float32, bfloat16 or float16 tensor on the CPU, got {got}")
    if x.layout is not torch.strided or x.is_nested:
        raise InputError(f"{name} must be a dense tensor, got the layout {x.layout}")
    if x.is_neg():
        raise InputError(f"{name} must hold its own values, got a lazy negation: use resolve_neg()")
    return GIVEN, code, x.shape, x.stride()


def optional_metadata(name: str, x: Tensor | None) -> Metadata | None:
    """The same, None for None."""
    return None if x is None else metadata(name, x)


def like(shape: Sequence[int], dtype: torch.dtype, order: torch.memory_format = torch.contiguous_format) -> Result:
    """A dense result."""
    strides, stride = [0] * len(shape), 1
    for d in (1, 3, 2, 0) if order is torch.channels_last else reversed(range(len(shape))):
        strides[d] = stride
        stride *= shape[d] or 1
    return Result(tuple(shape), tuple(strides), dtype)


def result_like(x: Tensor) -> Result:
    """A result that lies as ``x`` does, which is dense."""
    return Result(x.shape, x.stride(), x.dtype)


def operand(x: Tensor) -> Metadata:
    """A tensor as the extension takes it: (address, code of the dtype, shape, strides)."""
    _, code, shape, strides = metadata("x", x)
    return x.data_ptr(), code, shape, strides


def check_scalars(**scalars: Tensor | None) -> None:
    """Float32 tensors of one element on the CPU, which the extension reads at their address. Raises InputError."""
    for name, x in scalars.items():
        if x is not None and (x.dtype != torch.float32 or x.numel() != 1 or x.device.type != "cpu"):
            raise InputError(f"{name} must be one float32 on the CPU, got {x.dtype} {tuple(x.shape)} on {x.device}")


def check_seeds(seeds: Tensor) -> tuple[int, int]:
    """(GIVEN, number of seeds), as the extension takes them: int64 (B,) on the CPU and contiguous.

    Raises InputError for anything else.
    """
    if not isinstance(seeds, Tensor) or seeds.dtype != torch.int64 or seeds.ndim != 1 or seeds.device.type != "cpu":
        is_tensor = isinstance(seeds, Tensor)
        got = f"{seeds.dtype} {tuple(seeds.shape)} on {seeds.device}" if is_tensor else type(seeds).__name__
        raise InputError(f"seeds must be an int64 tensor (B,) on the CPU, got {got}")
    if not seeds.is_contiguous():
        raise InputError(f"seeds must be contiguous, got strides {seeds.stride()}")
    return GIVEN, len(seeds)
