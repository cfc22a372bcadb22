"""The saved states of a run: torch.distributed.checkpoint in folders that appear whole or not at all.

    OUT/state/00001000/   facts.json, .metadata, __RANK_0.distcp: written by all processes together, read by any number

A state is written to a hidden folder, synchronised to the disk and renamed, so that being killed at any moment, or a
full disk, leaves the earlier states as they were.
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
from msdd_fast.tokenizer import Tokenizer
from msdd_fast.training.loop.distributed import agree, barrier, fail, is_first, outcome, world_size

log = logging.getLogger(__name__)

FACTS = "facts.json"


class StateStore:
    """States of the run in ``folder``; the newest ``keep`` of them, and the best, stay.

    Every method is called by all processes.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep

    def steps(self) -> list[int]:
        """Steps of the complete states, oldest first."""
        if not self.folder.is_dir():
            return []
        return sorted(int(p.name) for p in self.folder.iterdir() if re.fullmatch(r"\d+", p.name))

    def path(self, step: int) -> Path:
        return self.folder / f"{step:08d}"

    def save(self, step: int, tensors: dict[str, Tensor], facts: dict[str, Any], best: int | None = None) -> None:
        """Write the state of ``step``, then remove all but the newest ``keep`` and that of step ``best``.

        Raises CheckpointError if it cannot be written; no earlier state is lost then.
        """
        target, temporary = self.path(step), self.folder / f".{step:08d}.tmp"
        if is_first():
            shutil.rmtree(temporary, ignore_errors=True)
        barrier()
        problem = None
        try:
            _write(temporary, tensors)
        except (Exception, CheckpointException) as e:  # torch's own, which all processes get, is no Exception
            problem = _reason(e)
        agree(lambda: self._finish(temporary, target, facts, problem))
        if is_first():
            kept = {*self.steps()[-self.keep :], best}
            for old in self.steps():
                if old not in kept:
                    shutil.rmtree(self.path(old), ignore_errors=True)

    def _finish(self, temporary: Path, target: Path, facts: dict[str, Any], problem: str | None) -> None:
        try:
            if problem is not None:
                raise OSError(problem)
            if is_first():
                (temporary / FACTS).write_text(json.dumps(facts, indent=2) + "\n")
                for name in (temporary / FACTS, temporary):
                    _sync(name)
                if target.exists():  # a damaged one that was passed over when the run was resumed
                    shutil.rmtree(target)
                os.replace(temporary, target)
                _sync(self.folder)
        except OSError as e:
            if is_first():
                shutil.rmtree(temporary, ignore_errors=True)
            steps = self.steps()
            left = f"the last saved state is that of step {steps[-1]}" if steps else "no state has been saved yet"
            raise CheckpointError(f"cannot save {target}: {e.strerror or e}; the run stops, {left}") from e

    def load(self, expected: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Tensors and facts of the newest readable state; None if there is none at all.

        A state that cannot be read is passed over with a warning if there is an earlier one. Raises CheckpointError if
        the only one cannot be read, or where a fact differs from ``expected``.
        """
        if is_first():
            for unfinished in self.folder.glob(".*.tmp"):
                shutil.rmtree(unfinished, ignore_errors=True)
        steps = self.steps()
        barrier()  # nobody lists the folder after somebody has gone on to write into it
        for step in reversed(steps):
            state, error = outcome(functools.partial(_read, self.path(step), expected))
            if state is not None:
                return state
            assert error is not None
            if step == steps[0] or not isinstance(error, _DamagedError):
                fail(error)
            if is_first():
                log.warning("%s; continuing from the state before it", error)
        return None


class _DamagedError(CheckpointError):
    """A state that cannot be read: an earlier one may serve. Not raised for one that belongs to another run."""


def _read(path: Path, expected: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    facts = read_facts(path)
    for name, mine in expected.items():
        if facts.get(name) != mine:
            raise CheckpointError(f"cannot resume from {path}: its {name} is not this run's; choose another out folder")
    return read_tensors(path), facts


def read_facts(path: Path) -> dict[str, Any]:
    """What a state says of itself besides its tensors. Raises CheckpointError."""
    try:
        facts = json.loads((path / FACTS).read_text())
    except (OSError, ValueError) as e:
        raise _DamagedError(f"cannot resume from {path}: {FACTS} cannot be read: {e}") from e
    if not isinstance(facts, dict):
        raise _DamagedError(f"cannot resume from {path}: {FACTS} must hold a mapping, got {type(facts).__name__}")
    return facts


def read_tensors(path: Path, prefix: str = "") -> dict[str, Tensor]:
    """The tensors of a state whose names begin with ``prefix``, on the CPU. Raises CheckpointError."""
    try:
        reader = dcp.FileSystemReader(path)
        tensors = {
            name: torch.zeros(entry.size, dtype=entry.properties.dtype)
            for name, entry in reader.read_metadata().state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata) and name.startswith(prefix)
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there is one process
            dcp.load(tensors, storage_reader=reader, no_dist=True)
    except (Exception, CheckpointException) as e:  # a damaged file can raise nearly anything
        raise _DamagedError(f"cannot resume from {path}: it is damaged: {_reason(e)}") from e
    return tensors


def export_state(path: Path, weights: str = "ema") -> Tokenizer:
    """The tokenizer of a saved state: its averaged weights ("ema") or those in training ("model")."""
    facts = read_facts(path)
    prefix = "ema." if weights == "ema" else "tokenizer."
    with torch.device("meta"):
        tokenizer = Tokenizer(config_from_dict(facts.get("config")))
    tensors = read_tensors(path, prefix)
    try:
        tokenizer.load_state_dict({name.removeprefix(prefix): t for name, t in tensors.items()}, assign=True)
    except RuntimeError as e:
        raise CheckpointError(f"{path} does not hold the weights of its config: {e}") from e
    return tokenizer.eval()


def _write(folder: Path, tensors: dict[str, Tensor]) -> None:
    """All processes write their share; every file is synchronised to the disk."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is one process
        dcp.save(tensors, storage_writer=dcp.FileSystemWriter(folder), no_dist=world_size() == 1)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _reason(error: BaseException) -> str:
    """The root of what torch.distributed.checkpoint raises, in one line."""
    failures = getattr(error, "failures", None)  # its own exception: one (exception, traceback) per process
    if failures:
        error = next(iter(failures.values()))[0]
    while error.__cause__ is not None or error.__context__ is not None:
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0]
