"""The saved states of a run, in the format of torch.distributed.checkpoint.

    OUT/state/00001000/   metadata.json, .metadata, __RANK_0.distcp: written by all processes, read by any number

A state is written to a hidden folder, synchronised to the disk and renamed. A kill at any moment or a full disk leaves
the earlier states intact.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from msdd_fast.errors import CheckpointError
from msdd_fast.families import config_from_dict
from msdd_fast.io.json_files import write_json
from msdd_fast.tokenizer import Tokenizer
from msdd_fast.training.loop.distributed import (
    barrier,
    is_rank0,
    on_all_ranks,
    raise_on_rank0,
    try_on_all_ranks,
    world_size,
)

log = logging.getLogger(__name__)

METADATA_FILE = "metadata.json"
OLD_METADATA_FILE = "facts.json"  # version 0.1


class StateStore:
    """The states in ``folder``, of which the newest ``keep`` and the best are kept.

    All processes call every method together.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep

    def steps(self) -> list[int]:
        """Steps of the complete states in rising order."""
        if not self.folder.is_dir():
            return []
        return sorted(int(p.name) for p in self.folder.iterdir() if re.fullmatch(r"\d+", p.name))

    def path(self, step: int) -> Path:
        return self.folder / f"{step:08d}"

    def save(self, step: int, tensors: dict[str, Tensor], metadata: dict[str, Any], best: int | None = None) -> None:
        """Write the state of ``step``, then remove all but the newest ``keep`` and that of step ``best``.

        Raises CheckpointError if it cannot be written, in which case no earlier state is removed.
        """
        target, temporary = self.path(step), self.folder / f".{step:08d}.tmp"
        if is_rank0():
            shutil.rmtree(temporary, ignore_errors=True)
        barrier()
        problem = None
        try:
            _write(temporary, tensors)
        except (Exception, CheckpointException) as e:  # torch's CheckpointException is not an Exception
            problem = _reason(e)
        on_all_ranks(lambda: self._finish(temporary, target, metadata, problem))
        if is_rank0():
            kept = {*self.steps()[-self.keep :], best}
            for old in self.steps():
                if old not in kept:
                    shutil.rmtree(self.path(old), ignore_errors=True)

    def _finish(self, temporary: Path, target: Path, metadata: dict[str, Any], problem: str | None) -> None:
        try:
            if problem is not None:
                raise OSError(problem)
            if is_rank0():
                write_json(temporary / METADATA_FILE, metadata)
                for name in (temporary / METADATA_FILE, temporary):
                    _sync(name)
                if target.exists():  # a damaged state that was ignored when the run was resumed
                    shutil.rmtree(target)
                os.replace(temporary, target)
                _sync(self.folder)
        except OSError as e:
            if is_rank0():
                shutil.rmtree(temporary, ignore_errors=True)
            steps = self.steps()
            left = f"the last saved state is that of step {steps[-1]}" if steps else "no state has been saved yet"
            raise CheckpointError(f"cannot save {target}: {e.strerror or e}; the run stops, {left}") from e

    def load(self, expected: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Tensors and metadata of the newest readable state, or None if there is no state.

        A damaged state is ignored with a warning if there is an earlier one. Raises CheckpointError if the only one is
        damaged, or if an entry of the metadata differs from ``expected``.
        """
        if is_rank0():
            for unfinished in self.folder.glob(".*.tmp"):
                shutil.rmtree(unfinished, ignore_errors=True)
        steps = self.steps()
        barrier()  # all list the folder before any goes on and writes into it
        for step in reversed(steps):
            state, error = try_on_all_ranks(functools.partial(_read, self.path(step), expected))
            if state is not None:
                return state
            assert error is not None
            if step == steps[0] or not isinstance(error, _DamagedError):
                raise_on_rank0(error)
            if is_rank0():
                log.warning("%s; continuing from the state before it", error)
        return None


class _DamagedError(CheckpointError):
    """A state that cannot be read, so that an earlier one may be used. Not raised for the state of another run."""


def _read(path: Path, expected: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    metadata = read_metadata(path)
    for name, mine in json.loads(json.dumps(expected)).items():  # tuples become lists, as in the file
        if metadata.get(name) != mine:
            raise CheckpointError(f"cannot resume from {path}: its {name} is not this run's; choose another out folder")
    return read_tensors(path), metadata


def read_metadata(path: Path) -> dict[str, Any]:
    """Everything in a state besides its tensors. Raises CheckpointError."""
    old = path / OLD_METADATA_FILE
    file = old if old.exists() else path / METADATA_FILE
    try:
        metadata = json.loads(file.read_text())
    except (OSError, ValueError) as e:
        raise _DamagedError(f"cannot resume from {path}: {file.name} cannot be read: {e}") from e
    if not isinstance(metadata, dict):
        raise _DamagedError(
            f"cannot resume from {path}: {file.name} must hold a mapping, got {type(metadata).__name__}"
        )
    return metadata


def read_tensors(path: Path, prefix: str = "") -> dict[str, Tensor]:
    """The tensors of a state whose names start with ``prefix``, on the CPU. Raises CheckpointError."""
    try:
        reader = dcp.FileSystemReader(path)
        tensors = {
            name: torch.zeros(entry.size, dtype=entry.properties.dtype)
            for name, entry in reader.read_metadata().state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata) and name.startswith(prefix)
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about being a single process
            dcp.load(tensors, storage_reader=reader, no_dist=True)
    except (Exception, CheckpointException) as e:  # a damaged file can raise nearly anything
        raise _DamagedError(f"cannot resume from {path}: it is damaged: {_reason(e)}") from e
    return tensors


def export_state(path: Path, weights: str = "ema") -> Tokenizer:
    """The tokenizer of a saved state, with its averaged weights ("ema") or those in training ("model")."""
    metadata = read_metadata(path)
    prefix = "ema." if weights == "ema" else "tokenizer."
    with torch.device("meta"):
        tokenizer = Tokenizer(config_from_dict(metadata.get("config")))
    tensors = read_tensors(path, prefix)
    try:
        tokenizer.load_state_dict({name.removeprefix(prefix): t for name, t in tensors.items()}, assign=True)
    except RuntimeError as e:
        raise CheckpointError(f"{path} does not hold the weights of its config: {e}") from e
    return tokenizer.eval()


def _write(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Each process writes its share and synchronises it to the disk."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about being a single process
        dcp.save(tensors, storage_writer=dcp.FileSystemWriter(folder), no_dist=world_size() == 1)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _reason(error: BaseException) -> str:
    """The root cause of an error of torch.distributed.checkpoint, in one line."""
    failures = getattr(error, "failures", None)  # of CheckpointException: (exception, traceback) by process
    if failures:
        error = next(iter(failures.values()))[0]
    while error.__cause__ is not None or error.__context__ is not None:
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0]
