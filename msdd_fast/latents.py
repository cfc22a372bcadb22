"""Files of latent tokens: safetensors with one tensor ``latents`` (N, tokens, dim) and a name for each image."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from msdd_fast.errors import InputError


class Latents(NamedTuple):
    """``z`` (N, tokens, dim) and N relative names without suffix, unique."""

    z: Tensor
    names: list[str]


def save_latents(latents: Latents, path: str | os.PathLike[str]) -> None:
    """Write atomically. Raises InputError if the file cannot be written."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=".safetensors", dir=path.parent)
        os.close(handle)
    except OSError as e:
        raise InputError(f"cannot write {path}: {e}") from e
    try:
        save_file({"latents": latents.z.contiguous().cpu()}, temporary, {"names": json.dumps(latents.names)})
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as e:
        raise InputError(f"cannot write {path}: {e}") from e
    finally:
        Path(temporary).unlink(missing_ok=True)


def load_latents(path: str | os.PathLike[str]) -> Latents:
    """Read a latents file; without names in it the images are called 000000, 000001, ...

    Raises InputError for a missing, damaged or foreign file, and for names that point outside a folder.
    """
    try:
        with safe_open(path, framework="pt") as f:
            if "latents" not in f.keys():  # noqa: SIM118 (not a dict)
                raise InputError(f"{path} must hold a tensor 'latents', got {', '.join(f.keys()) or 'nothing'}")
            z = f.get_tensor("latents")
            metadata = f.metadata() or {}
    except FileNotFoundError as e:
        raise InputError(f"latents file {path} does not exist") from e
    except (SafetensorError, OSError, ValueError) as e:
        if isinstance(e, InputError):
            raise
        raise InputError(f"{path} is damaged or not a safetensors file: {e}") from e
    if z.ndim != 3:
        raise InputError(f"{path}: latents must be (N, tokens, dim), got {tuple(z.shape)}")
    try:
        names = json.loads(metadata["names"]) if "names" in metadata else [f"{i:06d}" for i in range(len(z))]
    except json.JSONDecodeError as e:
        raise InputError(f"{path}: its list of names is not valid JSON: {e}") from e
    _check_names(names, len(z), path)
    return Latents(z, names)


def unique_names(files: list[Path], root: Path) -> list[str]:
    """Names relative to ``root`` without suffix; files that would share one keep their suffix."""
    relative = [PurePosixPath(f.relative_to(root).as_posix()) for f in files]
    stems = [str(r.with_suffix("")) for r in relative]
    return [str(r) if stems.count(s) > 1 else s for r, s in zip(relative, stems, strict=True)]


def concatenate(parts: list[Latents]) -> Latents:
    """Several files as one; the latents must agree in shape."""
    return Latents(torch.cat([p.z for p in parts]), [n for p in parts for n in p.names])


def _check_names(names: object, count: int, path: str | os.PathLike[str]) -> None:
    if not isinstance(names, list) or not all(isinstance(n, str) and n for n in names) or len(names) != count:
        raise InputError(f"{path}: expected {count} names, got {names if not isinstance(names, list) else len(names)}")
    for name in names:
        parts = PurePosixPath(name).parts
        if name.startswith("/") or ".." in parts or "\\" in name or "\0" in name:
            raise InputError(f"{path}: names must stay inside the output folder, got {name!r}")
    if len(set(names)) != count:
        raise InputError(f"{path}: names must be unique")
