"""Recorded programs: a function's native calls with their pointers and sizes, replayed without Python.

While a function is recorded, its tensors get their memory from an arena: a block is free again once nothing refers to
it, and serves the next tensor. A replay makes the same calls with the same pointers, so the arena needs only as much
memory as is alive at once, and keeps it as long as the program lives. Copies (``copy_``, ``zero_``, ``cat``,
``contiguous``, ...) become native calls; views cost nothing. Everything else that PyTorch would compute cannot be
recorded, and is refused by name.
"""

from __future__ import annotations

import bisect
import ctypes
import itertools
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from msdd_fast.backends import load_extension
from msdd_fast.errors import MsddFastError
from msdd_fast.native._call import operand

T = TypeVar("T")
CHUNK = 1 << 22
ALIGNMENT = 64


class NotRecordableError(MsddFastError, RuntimeError):
    """A function does something that a program cannot repeat; the message names it."""


class Arena:
    """Memory for tensors, taken from PyTorch in chunks and never given back while the arena lives."""

    def __init__(self) -> None:
        self._chunks: list[Tensor] = []
        self._free: list[tuple[int, int]] = []  # (address, bytes), sorted, neighbours joined
        self._blocks: dict[int, weakref.ref[Any]] = {}

    def empty(
        self, shape: Sequence[int], dtype: torch.dtype, order: torch.memory_format = torch.contiguous_format
    ) -> Tensor:
        """An uninitialised tensor; its memory is free again once its storage is gone."""
        count = torch.Size(shape).numel()
        if count == 0:
            return torch.empty(shape, dtype=dtype)
        size = -(-count * dtype.itemsize // ALIGNMENT) * ALIGNMENT
        address = self._take(size)
        block = (ctypes.c_char * size).from_address(address)
        self._blocks[address] = weakref.ref(block, lambda _, a=address, n=size: self._give_back(a, n))
        flat = torch.frombuffer(block, dtype=dtype, count=count)
        if order == torch.channels_last:
            b, c, h, w = shape
            return flat.view(b, h, w, c).permute(0, 3, 1, 2)
        return flat.view(torch.Size(shape))

    def memory(self) -> int:
        """Bytes of all chunks."""
        return sum(chunk.nbytes for chunk in self._chunks)

    def _take(self, size: int) -> int:
        fitting = [i for i, (_, n) in enumerate(self._free) if n >= size]
        if not fitting:
            chunk = torch.empty(max(CHUNK, size) + ALIGNMENT, dtype=torch.uint8)
            self._chunks.append(chunk)
            begin = -(-chunk.data_ptr() // ALIGNMENT) * ALIGNMENT
            self._give_back(begin, chunk.data_ptr() + chunk.nbytes - begin)
            fitting = [i for i, (_, n) in enumerate(self._free) if n >= size]
        i = min(fitting, key=lambda i: self._free[i][1])
        address, n = self._free[i]
        if n == size:
            del self._free[i]
        else:
            self._free[i] = (address + size, n - size)
        return address

    def _give_back(self, address: int, size: int) -> None:
        self._blocks.pop(address, None)
        i = bisect.bisect(self._free, (address, size))
        if i < len(self._free) and self._free[i][0] == address + size:
            size += self._free.pop(i)[1]
        if i > 0 and sum(self._free[i - 1]) == address:
            before, n = self._free[i - 1]
            self._free[i - 1] = (before, n + size)
        else:
            self._free.insert(i, (address, size))


class Recorded:
    """A program with the memory that its pointers refer to."""

    def __init__(self, program: Any, arena: Arena, keep: Any) -> None:
        self._program, self._arena, self._keep = program, arena, keep

    def replay(self) -> None:
        """Run all calls; releases the GIL."""
        self._program.replay(torch.get_num_threads())

    def __len__(self) -> int:
        return len(self._program)


def record(run: Callable[[], T], arena: Arena, keep: Any = None) -> tuple[Recorded, T]:
    """Run ``run`` once and record it; its result is in memory that every replay fills anew.

    ``keep`` holds whatever else its native calls point at: weights, tables, inputs. Raises NotRecordableError.
    """
    program = load_extension().Program()
    mode = _Recording(arena)
    with mode, _recording(program):
        result = run()
    return Recorded(program, arena, (keep, result, mode.kept)), result


@contextmanager
def _recording(program: Any) -> Iterator[None]:
    program.begin()
    try:
        yield
    finally:
        program.end()


def _copy(out: Tensor, x: Tensor | None) -> Tensor:
    load_extension().copy(operand(out), None if x is None else operand(x), torch.get_num_threads())
    return out


def _memory(x: Tensor) -> int | None:
    """What identifies the storage of a tensor; None if it has none, as in oneDNN's own layouts."""
    return x.untyped_storage()._cdata if x.layout == torch.strided else None


_READS_VALUES = frozenset({Tensor.item, Tensor.tolist, Tensor.__bool__, Tensor.__float__, Tensor.__int__, Tensor.numpy})


class _Recording(TorchFunctionMode):
    """Gives tensors their memory, turns copies into native calls, lets views pass and refuses the rest."""

    def __init__(self, arena: Arena) -> None:
        super().__init__()
        self.arena = arena
        # Tensors made outside whose memory calls point at: constants that a function makes anew each time.
        self.kept: list[Tensor] = []
        self._handlers: dict[Any, Callable[..., Any]] = {
            torch.empty: self._empty,
            torch.empty_like: self._empty_like,
            Tensor.new_empty: self._new_empty,
            Tensor.new_empty_strided: self._new_empty_strided,
            Tensor.copy_: lambda out, x, non_blocking=False: _copy(out, x),
            Tensor.zero_: lambda out: _copy(out, None),
            Tensor.contiguous: self._contiguous,
            Tensor.reshape: self._reshape,
            Tensor.flatten: self._flatten,
            Tensor.repeat: self._repeat,
            Tensor.to: self._to,
            Tensor.float: lambda x: self._to(x, torch.float32),
            Tensor.clone: lambda x, memory_format=torch.preserve_format: self._dense(x),
            Tensor.__setitem__: lambda out, index, x: _copy(out[index], x),
            torch.cat: self._cat,
        }

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _READS_VALUES:
            raise NotRecordableError(f"{func.__name__} reads a value, which a replay could not see change")
        handler = self._handlers.get(func)
        if handler is not None:
            return handler(*args, **kwargs)
        result = func(*args, **kwargs)
        made = [result] if isinstance(result, Tensor) else result if isinstance(result, (tuple, list)) else ()
        given = {_memory(t) for t in itertools.chain(args, kwargs.values()) if isinstance(t, Tensor)} - {None}
        if any(isinstance(t, Tensor) and _memory(t) not in given for t in made):
            name = getattr(func, "__name__", str(func))
            raise NotRecordableError(f"{name} computes in PyTorch, not in a native op")
        return result

    # --- Memory. ---

    def _empty(self, *sizes: Any, dtype: Any = None, device: Any = None, memory_format: Any = None, **_: Any) -> Tensor:
        shape = sizes[0] if len(sizes) == 1 and not isinstance(sizes[0], int) else sizes
        return self.arena.empty(shape, dtype or torch.get_default_dtype(), memory_format or torch.contiguous_format)

    def _empty_like(
        self, x: Tensor, *, dtype: Any = None, memory_format: Any = torch.preserve_format, **_: Any
    ) -> Tensor:
        if memory_format == torch.preserve_format:
            last = x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
            memory_format = torch.channels_last if last else torch.contiguous_format
        return self.arena.empty(x.shape, dtype or x.dtype, memory_format)

    def _new_empty(self, x: Tensor, *sizes: Any, dtype: Any = None, **_: Any) -> Tensor:
        return self._empty(*sizes, dtype=dtype or x.dtype)

    def _new_empty_strided(
        self, x: Tensor, size: Sequence[int], stride: Sequence[int], *, dtype: Any = None, **_: Any
    ) -> Tensor:
        """Dense, in any order of the dimensions."""
        order = sorted(range(len(size)), key=lambda d: (-stride[d], d))
        dense = self.arena.empty([size[d] for d in order], dtype or x.dtype)
        return dense.permute([order.index(d) for d in range(len(size))])

    # --- Copies. ---

    def _dense(self, x: Tensor, order: torch.memory_format = torch.contiguous_format) -> Tensor:
        return _copy(self.arena.empty(x.shape, x.dtype, order), x)

    def _contiguous(self, x: Tensor, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
        return x if x.is_contiguous(memory_format=memory_format) else self._dense(x, memory_format)

    def _reshape(self, x: Tensor, *shape: Any) -> Tensor:
        sizes = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        try:
            return x.view(*sizes)
        except RuntimeError:
            return self._dense(x).view(*sizes)

    def _flatten(self, x: Tensor, start_dim: int = 0, end_dim: int = -1) -> Tensor:
        first, last = start_dim % x.ndim, end_dim % x.ndim
        return self._reshape(x, (*x.shape[:first], x.shape[first : last + 1].numel(), *x.shape[last + 1 :]))

    def _repeat(self, x: Tensor, *times: int) -> Tensor:
        extra = len(times) - x.ndim
        x = x.view((1,) * extra + tuple(x.shape))
        out = self.arena.empty([s * t for s, t in zip(x.shape, times, strict=True)], x.dtype, torch.contiguous_format)
        pairs = out.view([n for s, t in zip(x.shape, times, strict=True) for n in (t, s)])
        _copy(pairs, x.view([n for s in x.shape for n in (1, s)]))
        return out

    def _to(self, x: Tensor, *args: Any, dtype: Any = None, copy: bool = False, **kwargs: Any) -> Tensor:
        kinds = [a for a in (*args, dtype) if isinstance(a, torch.dtype)]
        wanted = kinds[0] if kinds else x.dtype
        if wanted == x.dtype and not copy:
            return x
        return _copy(self.arena.empty(x.shape, wanted, torch.contiguous_format), x)

    def _cat(self, tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
        sizes = list(tensors[0].shape)
        dim %= len(sizes)
        sizes[dim] = sum(t.shape[dim] for t in tensors)
        out = self.arena.empty(sizes, tensors[0].dtype, torch.contiguous_format)
        begin = 0
        for t in tensors:
            _copy(out.narrow(dim, begin, t.shape[dim]), t)
            begin += t.shape[dim]
        return out
