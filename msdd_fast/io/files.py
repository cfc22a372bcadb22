"""Files written whole or not at all, and PyTorch files read without running anything in them."""

from __future__ import annotations

import argparse
import os
import re
import tempfile
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from msdd_fast.errors import CheckpointError, InputError


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives a temporary path beside ``path``, of the same suffix; it becomes ``path`` if the block succeeds.

    Folders are made as needed. Raises InputError if the file cannot be written; no part of it is left behind then.
    """
    path = Path(path)
    temporary = temporary_sibling(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except (OSError, SafetensorError) as e:
        raise InputError(f"cannot write {path}: {getattr(e, 'strerror', None) or e}") from e
    finally:
        if temporary.exists():
            temporary.unlink()


def temporary_sibling(path: Path) -> Path:
    """A hidden path in the same folder that nobody else uses."""
    return path.with_name(f".{uuid.uuid4().hex}{path.suffix}")


def require_writable(path: str | os.PathLike[str]) -> None:
    """Fail before the work, not after it: InputError if ``path`` is a folder or its folder cannot be written."""
    path = Path(path).absolute()
    try:
        if path.is_dir():
            raise InputError(f"output must be a file, got the folder {path}")
        folder = path.parent
        while not folder.exists():
            folder = folder.parent
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as e:
        raise InputError(f"cannot write {path}: {e.strerror or e}") from e


def read_torch_file(path: str | os.PathLike[str]) -> Any:
    """What ``torch.save`` wrote: tensors, plain containers and ``argparse.Namespace``, on the CPU.

    Raises CheckpointError if the file is missing, damaged, or holds anything else; nothing in it is run.
    """
    if not Path(path).is_file():
        raise CheckpointError(f"{path} is not a file")
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")  # guesses about the pickle protocol of damaged files
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # a damaged file can raise nearly anything
        foreign = re.search(r"GLOBAL (\S+)", str(e))
        if foreign:
            raise CheckpointError(
                f"{path} refused: it holds {foreign[1]}, and may hold only tensors and plain data"
            ) from e
        raise CheckpointError(f"{path} is damaged or not a PyTorch file") from e
