"""PyTorch files (.pt, .pth), read without running anything in them and without believing their sizes.

``torch.load(weights_only=True)`` is not used: what it may load is process-wide state, which threads change under each
other, it refuses a NumPy scalar or a ``defaultdict`` beside the weights, and its constructors allocate what a file asks
for. Here a pickle can only name what is in ``_MAKERS``, none of which makes more than the file holds.
"""

from __future__ import annotations

import argparse
import datetime
import io
import math
import os
import pickle
import re
import struct
import types
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from pathlib import Path, PurePath
from typing import Any, BinaryIO, ClassVar

import numpy as np
import torch
from torch import Tensor

from msdd_fast.errors import CheckpointError

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_STORAGES = {
    **{"FloatStorage": torch.float32, "DoubleStorage": torch.float64, "HalfStorage": torch.float16},
    **{"BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32},
    **{"ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8},
    **{"BoolStorage": torch.bool, "ComplexFloatStorage": torch.complex64},
    **{"ComplexDoubleStorage": torch.complex128, "UntypedStorage": torch.uint8},
}


def read_torch_file(path: str | os.PathLike[str]) -> Any:
    """What ``torch.save`` wrote: tensors, plain containers, and harmless extras such as NumPy scalars, on the CPU.

    Raises CheckpointError if the file is missing, damaged, compressed, or holds anything else; nothing in it is run.
    Safe in several threads.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path} is not a file")
    try:
        with open(path, "rb") as f:
            zipped = zipfile.is_zipfile(f)
            f.seek(0)
            return _read_zip(f) if zipped else _read_legacy(f)
    except _RefusedError as e:
        raise CheckpointError(
            f"{path} refused: it holds {e}, and may hold only tensors and plain data. If you trust the file, "
            "keep its weights alone: torch.save(torch.load(path, weights_only=False)[key], new_path)"
        ) from e
    except MemoryError as e:
        raise CheckpointError(f"{path} does not fit into memory") from e
    except Exception as e:  # a damaged file can raise nearly anything
        raise CheckpointError(f"{path} is damaged or not a PyTorch file") from e


class _RefusedError(pickle.UnpicklingError):
    """Holds what was found."""


def _read_zip(f: BinaryIO) -> Any:
    """The format since PyTorch 1.6: an archive of data.pkl and one uncompressed member for each storage."""
    size = os.fstat(f.fileno()).st_size
    with zipfile.ZipFile(f) as archive:
        members = {}
        for info in archive.infolist():
            if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
                raise _RefusedError(f"a compressed part, {info.filename}")
            members[info.filename.partition("/")[2]] = info
        if sum(info.file_size for info in members.values()) > size:
            raise _RefusedError("parts that overlap")
    if "byteorder" in members and _member(f, members["byteorder"]) != b"little":
        raise _RefusedError("big-endian numbers")
    storages: dict[str, Tensor] = {}

    def storage(dtype: torch.dtype, key: str, numel: int) -> Tensor:
        if key not in storages:
            storages[key] = _flat(_member(f, members[f"data/{key}"]), dtype, numel)
        return storages[key]

    return _Unpickler(io.BytesIO(_member(f, members["data.pkl"])), storage).load()


def _member(f: BinaryIO, info: zipfile.ZipInfo) -> bytearray:
    """Read past zipfile, which checks sums that PyTorch need not have written."""
    f.seek(info.header_offset)
    header = f.read(30)
    name, extra = struct.unpack("<HH", header[26:30])
    f.seek(name + extra, os.SEEK_CUR)
    data = bytearray(f.read(info.file_size))
    if header[:4] != b"PK\3\4" or len(data) != info.file_size:
        raise EOFError
    return data


def _read_legacy(f: BinaryIO) -> Any:
    """The format before: pickles of a magic number, a version, facts, the object and the storages' keys, then each
    storage's number of elements and its data."""
    size = os.fstat(f.fileno()).st_size
    found: dict[str, Tensor] = {}

    def storage(dtype: torch.dtype, key: str, numel: int) -> Tensor:
        nonlocal size
        if key not in found:
            size -= numel * dtype.itemsize
            if numel < 0 or size < 0:
                raise EOFError
            found[key] = torch.empty(numel, dtype=dtype)
        return found[key]

    magic, _, facts, content, keys = (_Unpickler(f, storage).load() for _ in range(5))
    if magic != _LEGACY_MAGIC or not facts["little_endian"]:
        raise pickle.UnpicklingError
    for key in keys:
        flat = found[key]
        numel = struct.unpack("<q", f.read(8))[0]
        data = bytearray(f.read(flat.nbytes))
        if flat.numel():
            flat.copy_(_flat(data, flat.dtype, numel))
    return content


def _flat(data: bytearray, dtype: torch.dtype, numel: int) -> Tensor:
    if numel * dtype.itemsize != len(data):
        raise EOFError
    return torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)


class _Unpickler(pickle._Unpickler):
    """Python's own in Python: that in C fills tables as large as a file says."""

    def __init__(self, file: Any, storage: Callable[[torch.dtype, str, int], Tensor]) -> None:
        super().__init__(file, encoding="utf-8")
        self._storage = storage

    def find_class(self, module: str, name: str) -> Any:
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        full = f"{module.replace('numpy.core.', 'numpy._core.')}.{name}"
        if full in _CLASSES:
            return _CLASSES[full]
        if full in _MAKERS:
            return _Maker(_MAKERS[full])
        if module in ("torch", "torch.storage") and name in _STORAGES:
            return _STORAGES[name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise _RefusedError(full.removeprefix("builtins."))

    def persistent_load(self, pid: Any) -> Tensor:
        kind, dtype, key, _, numel, *view = pid
        if kind != "storage" or not isinstance(numel, int):
            raise _RefusedError("something that is no storage outside its pickle")
        flat = self._storage(dtype, key, numel)
        if view and view[0] is not None:  # a part of another storage, in the old format
            _, offset, numel = view[0]
            return _tensor(flat, offset, (numel,), (1,))
        return flat

    def load_build(self) -> None:
        """Only what is made for it takes a state; attributes of an OrderedDict are of no use here."""
        state, made = self.stack.pop(), self.stack[-1]  # type: ignore[attr-defined]
        if isinstance(made, (_Namespace, _DType, _Array)):
            made.__setstate__(state)
        elif not isinstance(made, (OrderedDict, Tensor, types.SimpleNamespace)):
            raise _RefusedError(f"a state for {type(made).__name__}")
        elif isinstance(made, types.SimpleNamespace):
            vars(made).update(state)

    dispatch: ClassVar[dict[int, Callable[..., None]]] = {**pickle._Unpickler.dispatch, pickle.BUILD[0]: load_build}


class _Maker:
    """A function that a pickle may call; the pickle can do nothing else with it."""

    __slots__ = ("make",)

    def __init__(self, make: Callable[..., Any]) -> None:
        self.make = make

    def __call__(self, *args: Any) -> Any:
        return self.make(*args)


class _Namespace(argparse.Namespace):
    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


class _Text(str):
    """Such as torch.__version__."""


class _DType:
    """What a pickle says of a NumPy dtype: a kind, an item size and, as the state, an order of bytes."""

    def __init__(self, code: str, *_: Any) -> None:
        if not re.fullmatch(r"[biufcSU]\d{1,4}", code):
            raise _RefusedError(f"a NumPy array of {code}")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.dtype = self.dtype.newbyteorder(state[1] if state[1] in ("<", ">") else "=")

    def read(self, data: Any, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
        data = data.encode("latin-1") if isinstance(data, str) else data
        if len(data) != math.prod(shape) * self.dtype.itemsize or min(shape, default=0) < 0:
            raise EOFError
        return np.frombuffer(data, self.dtype).reshape(shape)


class _Array(np.ndarray):
    """A NumPy array, empty until its state comes."""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, kind, fortran, data = state
        content = kind.read(data, tuple(shape[::-1]) if fortran else tuple(shape))
        super().__setstate__((1, tuple(shape), kind.dtype, fortran, content.tobytes()))


def _scalar(kind: _DType, data: Any) -> Any:
    return kind.read(data, (1,))[0]


def _tensor(flat: Tensor, offset: int, size: Any, stride: Any, *_: Any) -> Tensor:
    """A view of a storage, within it and no larger: one element repeated by a stride of 0 may unpack to gigabytes."""
    size = tuple(size)
    if not isinstance(flat, Tensor) or min(size, default=0) < 0 or math.prod(size) > flat.numel():
        raise EOFError
    return torch.as_strided(flat, size, tuple(stride), offset)


def _tensor_v3(flat: Tensor, offset: int, size: Any, stride: Any, _: Any, hooks: Any, dtype: Any, *rest: Any) -> Tensor:
    return _tensor(flat.view(dtype), offset, size, stride)


def _typed(_: Any, kind: Any, args: tuple[Any, ...], state: Any) -> Any:
    """A tensor with attributes of its own, which are dropped."""
    if not isinstance(_, _Maker):
        raise pickle.UnpicklingError
    return _(*args)


def _parameter(data: Tensor, *_: Any) -> Tensor:
    return data


def _sparse(layout: Any, data: Any) -> Tensor:
    """A sparse tensor without its values: whoever asks for the weights says which of them is not dense."""
    size = tuple(data[2])
    return torch.sparse_coo_tensor(torch.empty(len(size), 0, dtype=torch.int64), torch.empty(0), size)


def _without_data(_: Any, size: Any, *rest: Any) -> Tensor:
    dtype = next((r for r in rest if isinstance(r, torch.dtype)), torch.float32)
    return torch.empty(tuple(size), dtype=dtype, device="meta")


def _refuse(*_: Any) -> Any:
    """Of classes that are arguments of what makes them."""
    raise _RefusedError("an object of its own making")


def _path(*parts: str) -> PurePath:
    return Path(*parts)


def _bytes(text: str = "", encoding: str = "latin1") -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise _RefusedError("bytes of another kind")
    return text.encode("latin-1")


def _bytearray(data: Any = b"", encoding: str = "latin1") -> bytearray:
    return bytearray(data if isinstance(data, (bytes, bytearray)) else _bytes(data, encoding))


def _nothing(kind: type) -> Callable[..., Any]:
    """``kind()`` without arguments, which for some ask for memory."""

    def make() -> Any:
        return kind()

    make.kind = kind  # type: ignore[attr-defined]
    return make


def _defaultdict(factory: Any = None, *content: Any) -> Any:
    kind = getattr(factory.make, "kind", None) if isinstance(factory, _Maker) else None
    return defaultdict(kind, *content)


def _once(kind: Callable[..., Any]) -> Callable[..., Any]:
    """``kind(content)`` of a container that is in the file."""

    def make(content: Any = (), *rest: Any) -> Any:
        if not isinstance(content, (list, tuple, dict, set, frozenset)):
            raise pickle.UnpicklingError
        return kind(content, *rest)

    make.kind = kind  # type: ignore[attr-defined]
    return make


_CLASSES: dict[str, type] = {
    "argparse.Namespace": _Namespace,
    "torch.torch_version.TorchVersion": _Text,
}
_MAKERS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._utils._rebuild_sparse_tensor": _sparse,
    "torch._utils._rebuild_meta_tensor_no_storage": lambda dtype, size, *_: _without_data(None, size, dtype),
    "torch._utils._rebuild_qtensor": lambda flat, offset, size, *_: _without_data(None, size),
    "torch._tensor._rebuild_from_type_v2": _typed,
    "torch.Tensor": _refuse,
    "torch.nn.parameter.Parameter": _refuse,
    "torch.serialization._get_layout": str,
    "torch.Size": _once(torch.Size),
    "torch.device": torch.device,
    "collections.OrderedDict": _once(OrderedDict),
    "collections.Counter": _once(Counter),
    "collections.deque": _once(deque),
    "collections.defaultdict": _defaultdict,
    "builtins.set": _once(set),
    "builtins.frozenset": _once(frozenset),
    "builtins.dict": _once(dict),
    "builtins.list": _once(list),
    "builtins.tuple": _once(tuple),
    "builtins.complex": complex,
    "builtins.bytearray": _bytearray,
    "builtins.bytes": _nothing(bytes),
    **{f"builtins.{kind.__name__}": _nothing(kind) for kind in (int, float, str, bool)},
    "_codecs.encode": _bytes,
    "types.SimpleNamespace": types.SimpleNamespace,
    "datetime.datetime": datetime.datetime,
    "datetime.date": datetime.date,
    "datetime.timedelta": datetime.timedelta,
    **{f"pathlib.{kind}": _path for kind in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath", "Path")},
    **{f"pathlib._local.{kind}": _path for kind in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")},
    "numpy.ndarray": _refuse,
    "numpy.dtype": _DType,
    "numpy._core.multiarray.scalar": _scalar,
    "numpy._core.multiarray._reconstruct": lambda *_: _Array((0,)),
}
