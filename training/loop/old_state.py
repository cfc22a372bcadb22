"""States of version 0.1, in the format of ``torch.distributed.checkpoint``, read without running anything in them.

    OUT/state/00001000/   facts.json or metadata.json, .metadata, __RANK_0.distcp

``.metadata`` is a pickle. It may name torch's metadata classes and nothing else, and even for those it gets inert
stand-ins. The tensors in the .distcp files are read by ``torch.load(weights_only=True)``.
"""

from __future__ import annotations

import io
import json
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from msdd_fast.errors import CheckpointError

METADATA_FILES = ("facts.json", "metadata.json")
INDEX_FILE = ".metadata"
LARGEST_INDEX = 1 << 28  # bytes

_METADATA = "torch.distributed.checkpoint.metadata"
_ALLOWED = {
    *((_METADATA, name) for name in ("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties")),
    *((_METADATA, name) for name in ("BytesStorageMetadata", "ChunkStorageMetadata", "TensorStorageMetadata")),
    (_METADATA, "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("pathlib", "PosixPath"),
    ("pathlib", "PurePosixPath"),
    ("pathlib", "WindowsPath"),
}


class DamagedError(CheckpointError):
    """A state that cannot be read, so that an earlier one may be used. Not raised for the state of another run."""


class _StandIn:
    """Keeps what the pickle gives it: ``arguments`` and ``state``."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments, self.state = arguments, None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Unpickler(pickle._Unpickler):  # in Python: it can be subclassed safely, and files are small
    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data))
        self._kinds: dict[str, type] = {}  # of this file alone, should it set attributes of them

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(dtype := vars(torch).get(name), torch.dtype):
            return dtype
        if (module, name) not in _ALLOWED:
            raise _ForeignError(f"{module}.{name}")
        return self._kinds.setdefault(name, type(name, (_StandIn,), {}))


class _ForeignError(Exception):
    """A pickle names what no state needs."""


def read_old_metadata(path: Path) -> dict[str, Any]:
    """Everything besides the tensors. Raises CheckpointError."""
    file = next((path / name for name in METADATA_FILES if (path / name).exists()), path / METADATA_FILES[0])
    try:
        metadata = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as e:
        raise DamagedError(f"cannot resume from {path}: {file.name} cannot be read: {e}") from e
    if not isinstance(metadata, dict):
        raise DamagedError(f"cannot resume from {path}: {file.name} must hold a mapping, got {type(metadata).__name__}")
    return metadata


def check_old_index(path: Path) -> None:
    """Raises CheckpointError if ``.metadata`` is damaged or names anything but torch's metadata classes."""
    try:
        _read_index(path / INDEX_FILE)
    except CheckpointError:
        raise
    except (Exception, RecursionError, MemoryError) as e:  # a damaged file can raise nearly anything
        raise DamagedError(f"cannot resume from {path}: it is damaged: {type(e).__name__}: {e}") from e


def read_old_tensors(path: Path, prefix: str = "") -> dict[str, Tensor]:
    """The tensors whose names start with ``prefix``, on the CPU.

    Raises CheckpointError; it says what the state holds if that is more than tensors.
    """
    try:
        index = _read_index(path / INDEX_FILE)
        return {name: _read_tensor(path, *entry) for name, entry in _entries(index, prefix)}
    except CheckpointError:
        raise
    except (Exception, RecursionError, MemoryError) as e:  # a damaged file can raise nearly anything
        raise DamagedError(f"cannot resume from {path}: it is damaged: {type(e).__name__}: {e}") from e


def _refused(file: Path, name: str) -> CheckpointError:
    return CheckpointError(
        f"{file} refused: it holds {name}, and a state may hold only tensors and plain data; nothing in it was run"
    )


def _read_index(file: Path) -> Any:
    if file.stat().st_size > LARGEST_INDEX:
        raise ValueError(f"{file.name} is larger than {LARGEST_INDEX} bytes")
    try:
        return _Unpickler(file.read_bytes()).load()
    except _ForeignError as e:
        raise _refused(file, str(e)) from None


def _entries(index: Any, prefix: str) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """(name, (dtype, size, chunks)) of every tensor; a chunk is (offsets, sizes, file, offset in it, length)."""
    stored = {
        (at.state["fqn"], _shape(at.state["offset"] or ())): info.state
        for at, info in index.state["storage_data"].items()
    }
    for name, tensor in index.state["state_dict_metadata"].items():
        if type(tensor).__name__ != "TensorStorageMetadata" or not name.startswith(prefix):
            continue
        chunks = []
        for chunk in tensor.state["chunks"]:
            offsets = _shape(chunk.state["offsets"])
            info = stored[name, offsets]
            chunks.append(
                (offsets, _shape(chunk.state["sizes"]), info["relative_path"], info["offset"], info["length"])
            )
        yield name, (tensor.state["properties"].state[0], _shape(tensor.state["size"]), chunks)


def _shape(size: Any) -> tuple[int, ...]:
    """A torch.Size, or its stand-in, as a tuple."""
    shape = tuple(size.arguments[0]) if isinstance(size, _StandIn) else tuple(size)
    if not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(f"{shape} is not a shape")
    return shape


def _read_tensor(path: Path, dtype: torch.dtype, size: tuple[int, ...], chunks: list[tuple[Any, ...]]) -> Tensor:
    parts = []
    for offsets, sizes, name, offset, length in chunks:
        if not re.fullmatch(r"__[0-9]+_[0-9]+\.distcp", name):
            raise ValueError(f"{name!r} is not a file of a state")
        with open(path / name, "rb") as f:
            f.seek(offset)
            data = f.read(length)
        try:
            part = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as e:
            foreign = re.search(r"GLOBAL (\S+)", str(e))
            if foreign:
                raise _refused(path / name, foreign[1]) from None
            raise
        if not isinstance(part, Tensor) or part.dtype != dtype or tuple(part.shape) != sizes:
            raise ValueError(f"{name} does not hold the tensor that .metadata promises")
        parts.append((offsets, part))
    if sum(part.numel() for _, part in parts) != torch.Size(size).numel():
        raise ValueError("a tensor is not complete")
    tensor = torch.zeros(size, dtype=dtype)
    for offsets, part in parts:
        place = tuple(slice(o, o + n) for o, n in zip(offsets, part.shape, strict=True))
        tensor[place] = part
    return tensor
