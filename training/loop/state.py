"""The saved states of a run.

    OUT/state/00001000/   metadata.json, tensors-00000-of-00002.safetensors, ..., SHA256SUMS

Every process writes its share of the tensors; any number of processes reads them. ``SHA256SUMS`` covers every other
file, as ``sha256sum -c`` checks it. A state is written to a hidden folder, synchronised to the disk and renamed. A kill
at any moment or a full disk leaves the earlier states intact. Nothing in a state is unpickled; states of version 0.1
are read by ``old_state``.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

from msdd_fast.errors import CheckpointError
from msdd_fast.families import config_from_dict
from msdd_fast.io.safetensors import read_safetensors
from msdd_fast.io.signals import raise_if_received
from msdd_fast.tokenizer import Tokenizer
from msdd_fast.training.loop.distributed import (
    barrier,
    gather,
    is_rank0,
    on_all_ranks,
    raise_on_rank0,
    rank,
    try_on_all_ranks,
    world_size,
)
from msdd_fast.training.loop.old_state import DamagedError, check_old_index, read_old_metadata, read_old_tensors

log = logging.getLogger(__name__)

METADATA_FILE = "metadata.json"
SUMS_FILE = "SHA256SUMS"
OLD_INDEX_FILE = ".metadata"  # version 0.1

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class StateStore:
    """The states in ``folder``, of which the newest ``keep`` readable ones and the best are kept.

    All processes call every method together.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep
        self._readable: dict[int, bool] = {}

    def steps(self) -> list[int]:
        """Steps of the complete states in rising order."""
        if not self.folder.is_dir():
            return []
        names = [p.name for p in self.folder.iterdir() if re.fullmatch(r"[0-9]+", p.name) and p.is_dir()]
        return sorted(int(name) for name in names if name == self.path(int(name)).name)

    def path(self, step: int) -> Path:
        return self.folder / f"{step:08d}"

    def save(self, step: int, tensors: Mapping[str, Tensor], metadata: dict[str, Any], best: int | None = None) -> None:
        """Write the state of ``step``, then remove the superfluous ones; see ``prune``.

        Raises CheckpointError if it cannot be written, in which case no earlier state is removed.
        """
        target, temporary = self.path(step), self.folder / f".{step:08d}.tmp"
        if is_rank0():
            shutil.rmtree(temporary, ignore_errors=True)
        barrier()
        sums: dict[str, str] = {}
        problem = None
        try:
            sums = _write_share(temporary, tensors)
        except Exception as e:  # reported by all ranks together
            problem = _reason(e)
        sums = {name: digest for part in gather(sums) for name, digest in part.items()}
        on_all_ranks(lambda: self._finish(temporary, target, metadata, sums, problem))
        self._readable[step] = True
        self.prune(step, best)

    def prune(self, newest: int, best: int | None = None) -> None:
        """Remove all states but ``newest``, just saved, the newest ``keep`` that can be read, and that of ``best``.

        Damaged states count for nothing. One among the newest is left alone: the run overwrites it if it gets there.
        """
        if not is_rank0():
            return
        kept = {newest, best}
        readable = 0
        for step in reversed(self.steps()):
            if readable == self.keep:
                if step not in kept:
                    shutil.rmtree(self.path(step), ignore_errors=True)
            elif self._is_readable(step):
                readable += 1

    def _is_readable(self, step: int) -> bool:
        if step not in self._readable:
            try:
                verify(self.path(step))
                self._readable[step] = True
            except CheckpointError:
                self._readable[step] = False
        return self._readable[step]

    def _finish(
        self, temporary: Path, target: Path, metadata: dict[str, Any], sums: dict[str, str], problem: str | None
    ) -> None:
        try:
            if problem is not None:
                raise OSError(problem)
            if is_rank0():
                content = (json.dumps(metadata, indent=2) + "\n").encode()
                _write_file(temporary / METADATA_FILE, content)
                sums = {**sums, METADATA_FILE: hashlib.sha256(content).hexdigest()}
                lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items()))
                _write_file(temporary / SUMS_FILE, lines.encode())
                _sync_folder(temporary)
                raise_if_received()
                if target.exists():  # a damaged state that was passed over when the run was resumed
                    shutil.rmtree(target)
                os.replace(temporary, target)
                _sync_folder(self.folder)
        except OSError as e:
            if is_rank0():
                shutil.rmtree(temporary, ignore_errors=True)
            steps = [s for s in self.steps() if self._readable.get(s, True)]
            left = f"the last saved state is that of step {steps[-1]}" if steps else "no state has been saved yet"
            raise CheckpointError(f"cannot save {target}: {e.strerror or e}; the run stops, {left}") from e

    def load(
        self, expected: dict[str, Any], check: Callable[[dict[str, Any]], str | None] = lambda metadata: None
    ) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Tensors and metadata of the newest readable state, or None if there is no state.

        A damaged state is passed over with a warning if there is an earlier one. So is one of whose metadata ``check``
        says what is wrong. Raises CheckpointError if the only one is damaged, if an entry of the metadata differs from
        ``expected``, or if a state holds anything but tensors and plain data.
        """
        if is_rank0() and self.folder.is_dir():
            for unfinished in self.folder.glob(".*.tmp"):
                shutil.rmtree(unfinished, ignore_errors=True)
        steps = self.steps()
        barrier()  # all list the folder before any goes on and writes into it
        for step in reversed(steps):
            state, error = try_on_all_ranks(functools.partial(_read, self.path(step), expected, check))
            self._readable[step] = state is not None
            if state is not None:
                return state
            assert error is not None
            if step == steps[0] or not isinstance(error, DamagedError):
                raise_on_rank0(error)
            if is_rank0():
                log.warning("%s; continuing from the state before it", error)
        return None


def _read(
    path: Path, expected: dict[str, Any], check: Callable[[dict[str, Any]], str | None]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    verify(path)
    metadata = read_metadata(path)
    for name, mine in json.loads(json.dumps(expected)).items():  # tuples become lists, as in the file
        if metadata.get(name) != mine:
            raise CheckpointError(f"cannot resume from {path}: its {name} is not this run's; choose another out folder")
    wrong = check(metadata)
    if wrong is not None:
        raise DamagedError(f"cannot resume from {path}: its metadata are damaged: {wrong}")
    return _read_files(path, ""), metadata


def _is_old(path: Path) -> bool:
    return not (path / SUMS_FILE).exists() and (path / OLD_INDEX_FILE).exists()


def verify(path: Path) -> None:
    """Compare every file of a state with its checksum; one of version 0.1 has none. Raises CheckpointError."""
    if _is_old(path):
        check_old_index(path)
        return
    for name, digest in _read_sums(path).items():
        sha = hashlib.sha256()
        try:
            with open(path / name, "rb") as f:
                while block := f.read(1 << 20):
                    sha.update(block)
        except OSError as e:
            raise DamagedError(f"cannot resume from {path}: {name} cannot be read: {e.strerror or e}") from e
        if sha.hexdigest() != digest:
            raise DamagedError(f"cannot resume from {path}: it is damaged: {name} has another checksum")


def _read_sums(path: Path) -> dict[str, str]:
    """File name to SHA-256 in hexadecimal, of all tensors and metadata.json."""
    try:
        lines = (path / SUMS_FILE).read_text(encoding="ascii").split("\n")
    except (OSError, ValueError) as e:
        raise DamagedError(f"cannot resume from {path}: it is damaged: {SUMS_FILE} cannot be read: {e}") from e
    sums: dict[str, str] = {}
    shards: set[tuple[int, int]] = set()
    for line in lines[:-1]:
        found = re.fullmatch(r"([0-9a-f]{64})  (metadata\.json|tensors-([0-9]{5,})-of-([0-9]{5,})\.safetensors)", line)
        if found is None or found[2] in sums:
            raise DamagedError(f"cannot resume from {path}: it is damaged: a line of {SUMS_FILE} is wrong")
        sums[found[2]] = found[1]
        if found[3] is not None:
            shards.add((int(found[3]), int(found[4])))
    whole = {(i, len(shards)) for i in range(len(shards))}
    if lines[-1] or METADATA_FILE not in sums or not shards or shards != whole:
        raise DamagedError(f"cannot resume from {path}: it is damaged: {SUMS_FILE} is not complete")
    return sums


def read_metadata(path: Path) -> dict[str, Any]:
    """Everything in a state besides its tensors. Raises CheckpointError."""
    if _is_old(path):
        return read_old_metadata(path)
    try:
        metadata = json.loads((path / METADATA_FILE).read_text())
    except (OSError, ValueError, RecursionError) as e:
        raise DamagedError(f"cannot resume from {path}: {METADATA_FILE} cannot be read: {e}") from e
    if not isinstance(metadata, dict):
        raise DamagedError(
            f"cannot resume from {path}: {METADATA_FILE} must hold a mapping, got {type(metadata).__name__}"
        )
    return metadata


def read_tensors(path: Path, prefix: str = "") -> dict[str, Tensor]:
    """The tensors of a state whose names start with ``prefix``, on the CPU. Raises CheckpointError."""
    verify(path)
    return _read_files(path, prefix)


def _read_files(path: Path, prefix: str) -> dict[str, Tensor]:
    if _is_old(path):
        return read_old_tensors(path, prefix)
    tensors: dict[str, Tensor] = {}
    for name in _read_sums(path):
        if name == METADATA_FILE:
            continue
        try:
            part = read_safetensors(path / name)
        except CheckpointError as e:
            raise DamagedError(f"cannot resume from {path}: it is damaged: {e}") from e
        twice = sorted(tensors.keys() & part.keys())
        if twice:
            raise DamagedError(f"cannot resume from {path}: it is damaged: {twice[0]} is in two files")
        tensors |= part
    return {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def export_state(path: Path, weights: str = "ema") -> Tokenizer:
    """The tokenizer of a saved state, with its averaged weights ("ema") or those in training ("model")."""
    verify(path)
    config = config_from_dict(read_metadata(path).get("config"))
    prefix = "ema." if weights == "ema" else "tokenizer."
    tensors = _read_files(path, prefix)
    return Tokenizer.from_stored(config, {name.removeprefix(prefix): t for name, t in tensors.items()}, str(path))


def _write_share(folder: Path, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Write this process's share of the tensors, which all have, to one file: {its name: its SHA-256}."""
    folder.mkdir(parents=True, exist_ok=True)
    loads = [0] * world_size()
    mine = []
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].nbytes, item[0])):
        least = loads.index(min(loads))
        loads[least] += tensor.nbytes
        if least == rank():
            mine.append((name, tensor))
    file = f"tensors-{rank():05d}-of-{world_size():05d}.safetensors"
    return {file: _write_safetensors(folder / file, mine)}


def _write_safetensors(path: Path, tensors: list[tuple[str, Tensor]]) -> str:
    """Write and synchronise a safetensors file, one tensor in memory at a time; its SHA-256. Raises OSError."""
    header, end = {}, 0
    for name, tensor in tensors:
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    sha = hashlib.sha256()
    with open(path, "wb") as f:
        for part in (len(text).to_bytes(8, "little"), text):
            sha.update(part)
            f.write(part)
        for _, tensor in tensors:
            data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
            sha.update(data)
            f.write(data)
        f.flush()
        os.fsync(f.fileno())
    return sha.hexdigest()


def _write_file(path: Path, content: bytes) -> None:
    with open(path, "wb") as f:
        f.write(content)
        f.flush()
        os.fsync(f.fileno())


def _sync_folder(path: Path) -> None:
    if os.name == "nt":  # folders cannot be opened there
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _reason(error: BaseException) -> str:
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0]


def is_count(value: object) -> TypeGuard[int]:
    """Whether a value out of JSON is an integer of at least 0."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value out of JSON is a number that float holds, NaN excluded."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value)
