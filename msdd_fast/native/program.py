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
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial, reduce
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from msdd_fast.backends import load_extension
from msdd_fast.errors import MsddFastError
from msdd_fast.native._call import operand

T = TypeVar("T")
CHUNK = 1 << 22
ALIGNMENT = 64
SPARE = 1 / 16
"""Of an arena: what lies unused between tensors of many sizes."""


class NotRecordableError(MsddFastError, RuntimeError):
    """A function does something that a program cannot repeat; the message names it."""


class Arena:
    """Memory for tensors, in chunks of at least ``chunk`` bytes that live as long as the arena or a tensor in them."""

    def __init__(self, chunk: int = CHUNK) -> None:
        self._chunk = chunk
        self._chunks: dict[int, bytearray] = {}  # by address
        self._free: list[tuple[int, int]] = []  # (address, bytes), sorted, neighbours joined
        self._blocks: dict[int, weakref.ref[Any]] = {}
        # Blocks that nothing refers to any more. The garbage collector may say so at any moment, in any thread, so they
        # join the free ones only when memory is asked for.
        self._released: deque[tuple[int, int]] = deque()

    def empty(
        self, shape: Sequence[int], dtype: torch.dtype, order: torch.memory_format = torch.contiguous_format
    ) -> Tensor:
        """An uninitialised tensor; its memory is free again once its storage is gone."""
        count = torch.Size(shape).numel()
        if count == 0:
            return torch.empty(shape, dtype=dtype)
        size = -(-count * dtype.itemsize // ALIGNMENT) * ALIGNMENT
        self._collect()
        address = self._take(size)
        begin = max(a for a in self._chunks if a <= address)
        block = (ctypes.c_char * size).from_buffer(self._chunks[begin], address - begin)
        self._blocks[address] = weakref.ref(block, partial(_release, self._released, address, size))
        flat = torch.frombuffer(block, dtype=dtype, count=count)
        if order == torch.channels_last:
            b, c, h, w = shape
            return flat.view(b, h, w, c).permute(0, 3, 1, 2)
        return flat.view(torch.Size(shape))

    def reserve(self, size: int) -> None:
        """Make room in one piece for tensors of ``size`` bytes, alive at once: in pieces more would lie unused."""
        self._collect()
        room = room_for(size, self._chunk)
        if room > self._chunk and all(n < room for _, n in self._free):
            self._add_chunk(room)

    def memory(self) -> int:
        """Bytes of all chunks."""
        return sum(map(len, self._chunks.values()))

    def _collect(self) -> None:
        while self._released:
            address, size = self._released.popleft()
            del self._blocks[address]
            self._give_back(address, size)

    def _take(self, size: int) -> int:
        fitting = [i for i, (_, n) in enumerate(self._free) if n >= size]
        if not fitting:
            self._add_chunk(size)
            fitting = [i for i, (_, n) in enumerate(self._free) if n >= size]
        i = min(fitting, key=lambda i: self._free[i][1])
        address, n = self._free[i]
        if n == size:
            del self._free[i]
        else:
            self._free[i] = (address + size, n - size)
        return address

    def _add_chunk(self, size: int) -> None:
        chunk = bytearray(max(self._chunk, size) + ALIGNMENT)
        begin = ctypes.addressof(ctypes.c_char.from_buffer(chunk))
        self._chunks[begin] = chunk
        aligned = -(-begin // ALIGNMENT) * ALIGNMENT
        self._give_back(aligned, begin + len(chunk) - aligned)

    def _give_back(self, address: int, size: int) -> None:
        i = bisect.bisect(self._free, (address, size))
        if i < len(self._free) and self._free[i][0] == address + size:
            size += self._free.pop(i)[1]
        if i > 0 and sum(self._free[i - 1]) == address:
            before, n = self._free[i - 1]
            self._free[i - 1] = (before, n + size)
        else:
            self._free.insert(i, (address, size))


def room_for(size: int, chunk: int = CHUNK) -> int:
    """Bytes of an arena in which tensors of ``size`` bytes, alive at once, find room."""
    return -(-int(size * (1 + SPARE)) // chunk) * chunk


def trim_heap() -> None:
    """Give what the C library's heap keeps of freed memory back to the system, where there is a way (glibc)."""
    try:
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    except (OSError, TypeError):  # no such library: Windows
        return
    if trim is not None:
        trim(0)


def _release(released: deque[tuple[int, int]], address: int, size: int, _: object) -> None:
    released.append((address, size))


class Recorded:
    """A program with the memory that its pointers refer to."""

    def __init__(self, program: Any, arena: Arena, keep: Any) -> None:
        self._program, self._arena, self._keep = program, arena, keep

    def replay(self) -> None:
        """Run all calls; releases the GIL."""
        self._program.replay(torch.get_num_threads())

    def __len__(self) -> int:
        return len(self._program)


class ImageProgram(NamedTuple):
    """A program of one image: the contiguous tensors (1, ...) that it reads and writes."""

    program: Recorded
    inputs: tuple[Tensor, ...]
    results: tuple[Tensor, ...]


def replay_images(programs: Sequence[ImageProgram], inputs: Sequence[Tensor], results: Sequence[Tensor]) -> None:
    """Fill ``results`` from ``inputs``, contiguous tensors (B, ...): each image by one of the programs.

    A program takes the next image when it is done with one. Releases the GIL.
    """

    def pairs(own: Sequence[Tensor], batch: Sequence[Tensor]) -> list[tuple[int, int, int]]:
        return [(o.data_ptr(), b.data_ptr(), o.nbytes) for o, b in zip(own, batch, strict=True)]

    workers = [(p.program._program, pairs(p.inputs, inputs), pairs(p.results, results)) for p in programs]
    load_extension().replay_images(workers, len(results[0]), torch.get_num_threads())


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
    try:
        program.begin()
        yield
    finally:
        program.end()


def _copy(out: Tensor, x: Tensor | None) -> Tensor:
    load_extension().copy(operand(out), None if x is None else operand(x), torch.get_num_threads())
    return out


# Functions that neither read nor write elements: metadata and views. Attributes (``__get__``) are of this kind, too.
_VIEWS = frozenset(
    {
        *(Tensor.view, Tensor.transpose, Tensor.permute, Tensor.t, Tensor.expand, Tensor.unflatten, Tensor.detach),
        *(Tensor.chunk, Tensor.split, Tensor.unbind, Tensor.narrow, Tensor.select, Tensor.squeeze, Tensor.unsqueeze),
        *(Tensor.__getitem__, Tensor.size, Tensor.stride, Tensor.dim, Tensor.numel, Tensor.__len__, Tensor.data_ptr),
        *(Tensor.is_contiguous, Tensor.storage_offset, Tensor.element_size, Tensor.is_floating_point, Tensor.is_neg),
        *(torch.chunk, torch.unbind, torch.transpose, torch.permute, torch.is_floating_point),
    }
)
# Kept here, since a test may replace them; a mode then sees either.
_EMPTY, _EMPTY_LIKE, _NEW_EMPTY, _NEW_EMPTY_STRIDED = (
    *(torch.empty, torch.empty_like),
    *(Tensor.new_empty, Tensor.new_empty_strided),
)


def _is_view(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether a function of _VIEWS reads no elements, given its arguments behind the tensor.

    An index must consist of integers, slices, None and ``...``. Tensors, lists and booleans select elements by value:
    they would be read once, when the program is recorded.
    """
    index = args[0] if func is Tensor.__getitem__ else ()
    parts = index if isinstance(index, tuple) else (index,)
    plain = all(p is None or p is ... or type(p) in (int, slice) for p in parts)
    return plain and not any(isinstance(a, Tensor) for a in (*args, *kwargs.values()))


class _Recording(TorchFunctionMode):
    """Gives tensors their memory, turns copies into native calls, lets views pass and refuses the rest."""

    def __init__(self, arena: Arena) -> None:
        super().__init__()
        self.arena = arena
        # Tensors made outside whose memory calls point at: constants that a function makes anew each time.
        self.kept: list[Tensor] = []
        self._handlers: dict[Any, Callable[..., Any]] = {
            **dict.fromkeys((_EMPTY, torch.empty), self._empty),
            **dict.fromkeys((_EMPTY_LIKE, torch.empty_like), self._empty_like),
            **dict.fromkeys((_NEW_EMPTY, Tensor.new_empty), self._new_empty),
            **dict.fromkeys((_NEW_EMPTY_STRIDED, Tensor.new_empty_strided), self._new_empty_strided),
            Tensor.copy_: lambda out, x, non_blocking=False: _copy(out, x),
            Tensor.zero_: lambda out: _copy(out, None),
            Tensor.fill_: self._fill,
            Tensor.contiguous: self._contiguous,
            Tensor.reshape: self._reshape,
            Tensor.flatten: self._flatten,
            Tensor.repeat: self._repeat,
            Tensor.to: self._to,
            Tensor.float: lambda x: self._to(x, torch.float32),
            Tensor.clone: lambda x, memory_format=torch.preserve_format: self._dense(x),
            Tensor.__setitem__: self._set,
            torch.cat: self._cat,
        }

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func))
        handler = self._handlers.get(func)
        if handler is not None:
            return handler(*args, **kwargs)
        if name == "__get__" or (func in _VIEWS and _is_view(func, args[1:], kwargs)):
            return func(*args, **kwargs)
        if not any(isinstance(a, Tensor) for a in (*args, *kwargs.values())):
            result = func(*args, **kwargs)
            if not isinstance(result, Tensor):  # a setting, such as whether gradients are enabled
                return result
        raise NotRecordableError(f"{name} computes in PyTorch, not in a native op")

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

    def _fill(self, out: Tensor, value: float) -> Tensor:
        constant = torch.tensor(value, dtype=out.dtype).view((1,) * out.ndim)
        self.kept.append(constant)
        return _copy(out, constant)

    def _set(self, out: Tensor, index: Any, x: Any) -> None:
        if not _is_view(Tensor.__getitem__, (index,), {}):
            raise NotRecordableError("__setitem__ takes an index that is computed")
        part = out[index]
        if isinstance(x, Tensor):
            _copy(part, x.expand(part.shape))
        else:
            self._fill(part, x)

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

    def _repeat(self, x: Tensor, *sizes: Any) -> Tensor:
        times = sizes[0] if len(sizes) == 1 and not isinstance(sizes[0], int) else sizes
        extra = len(times) - x.ndim
        x = x.view((1,) * extra + tuple(x.shape))
        out = self.arena.empty([s * t for s, t in zip(x.shape, times, strict=True)], x.dtype, torch.contiguous_format)
        pairs = out.view([n for s, t in zip(x.shape, times, strict=True) for n in (t, s)])
        _copy(pairs, x.view([n for s in x.shape for n in (1, s)]))
        return out

    def _to(self, x: Tensor, *args: Any, dtype: Any = None, copy: bool = False, **kwargs: Any) -> Tensor:
        kinds = [a.dtype if isinstance(a, Tensor) else a for a in (*args, dtype)]
        wanted = next((k for k in kinds if isinstance(k, torch.dtype)), x.dtype)
        if wanted == x.dtype and not copy:
            return x
        return _copy(self.arena.empty(x.shape, wanted, torch.contiguous_format), x)

    def _cat(self, tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
        sizes = list(tensors[0].shape)
        dim %= len(sizes)
        sizes[dim] = sum(t.shape[dim] for t in tensors)
        dtype = reduce(torch.promote_types, (t.dtype for t in tensors))
        out = self.arena.empty(sizes, dtype, torch.contiguous_format)
        begin = 0
        for t in tensors:
            _copy(out.narrow(dim, begin, t.shape[dim]), t)
            begin += t.shape[dim]
        return out
