"""Files of latents: safetensors with one tensor ``latents`` and a name for each image.

Latent tokens are (N, tokens, dim), the spatial latents of SSDD (N, channels, height, width).
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor

from msdd_fast.errors import InputError
from msdd_fast.io.files import as_path, parse_json
from msdd_fast.io.safetensors import open_safetensors, write_safetensors


class Latents(NamedTuple):
    """``z`` (N, tokens, dim) or (N, channels, height, width), and N relative names without suffix, unique."""

    z: Tensor
    names: list[str]


def save_latents(latents: Latents, path: str | os.PathLike[str]) -> None:
    """Write atomically; ``-`` is standard output.

    Raises InputError if a name would not load again or the file cannot be written.
    """
    check_names(latents.names, len(latents.z), path)
    write_safetensors({"latents": latents.z}, path, {"names": json.dumps(latents.names)})


def load_latents(path: str | os.PathLike[str]) -> Latents:
    """Read a latents file; without names in it the images are called 000000, 000001, ...

    Raises InputError for a missing, damaged or foreign file, and for names that point outside a folder.
    """
    with _opened(path) as f:
        z, metadata = f.get_tensor("latents"), f.metadata() or {}
    return Latents(z, _names(path, tuple(z.shape), metadata))


class Head(NamedTuple):
    """What a latents file says without its numbers: shape (N, ...) of the latents, their dtype, N names."""

    shape: tuple[int, ...]
    dtype: str
    names: list[str]


def latents_head(path: str | os.PathLike[str]) -> Head:
    """Only the header of a latents file is read. Otherwise as ``load_latents``."""
    with _opened(path) as f:
        piece, metadata = f.get_slice("latents"), f.metadata() or {}
        shape, dtype = tuple(piece.get_shape()), piece.get_dtype()
    return Head(shape, dtype, _names(path, shape, metadata))


def load_rows(path: str | os.PathLike[str], first: int, last: int) -> Tensor:
    """The latents ``first`` to ``last`` of a file. Raises as ``load_latents``."""
    with _opened(path) as f:
        rows: Tensor = f.get_slice("latents")[first:last]
    return rows


@contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[Any]:
    as_path("latents file", path)
    try:
        if Path(path).exists() and not Path(path).is_file():
            raise ValueError("not a regular file")
        with open_safetensors(path) as f:
            if "latents" not in f.keys():  # noqa: SIM118 (not a dict)
                raise InputError(f"{path} must hold a tensor 'latents', got {', '.join(f.keys()) or 'nothing'}")
            yield f
    except FileNotFoundError as e:
        raise InputError(f"latents file {path} does not exist") from e
    except (SafetensorError, OSError, ValueError, RuntimeError) as e:
        if isinstance(e, InputError):
            raise
        raise InputError(f"{path} is damaged or not a safetensors file: {e}") from e


def _names(path: str | os.PathLike[str], shape: tuple[int, ...], metadata: dict[str, str]) -> list[str]:
    if len(shape) not in (3, 4):
        raise InputError(f"{path}: latents must be (N, tokens, dim) or (N, channels, height, width), got {shape}")
    try:
        names = parse_json(metadata["names"].encode()) if "names" in metadata else [f"{i:06d}" for i in range(shape[0])]
    except ValueError as e:
        raise InputError(f"{path}: its list of names is not valid JSON: {e}") from e
    check_names(names, shape[0], path)
    found: list[str] = names
    return found


def unique_names(files: list[Path], root: Path) -> list[str]:
    """Names relative to ``root`` without suffix; files that would share one keep their suffix."""
    relative = [PurePosixPath(f.relative_to(root).as_posix()) for f in files]
    stems = [str(r.with_suffix("")) for r in relative]
    count = Counter(stems)
    names = [str(r) if count[s] > 1 else s for r, s in zip(relative, stems, strict=True)]
    if len(set(names)) < len(names):  # a.png, a.jpg and a.png.png
        names = [str(r) for r in relative]
    check_names(names, len(files), root)
    return names


def concatenate(parts: Sequence[Latents]) -> Latents:
    """Several files as one. Raises InputError if their latents differ in shape."""
    shapes = sorted({tuple(p.z.shape[1:]) for p in parts})
    if len(shapes) > 1:
        raise InputError(f"latents files must agree in shape, got {' and '.join(map(str, shapes))}")
    return Latents(torch.cat([p.z for p in parts]), [n for p in parts for n in p.names])


def check_names(names: object, count: int, source: str | os.PathLike[str]) -> None:
    """Raise InputError unless ``names`` are ``count`` different relative paths that stay inside a folder."""
    if not isinstance(names, list) or not all(isinstance(n, str) and n for n in names) or len(names) != count:
        got = len(names) if isinstance(names, list) else type(names).__name__
        raise InputError(f"{source}: names must be {count} non-empty strings, got {got}")
    for name in names:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or str(path) != name or "\\" in name or "\0" in name:
            raise InputError(f"{source}: names must be plain paths inside the output folder, got {name!r}")
    if len(set(names)) != count:
        raise InputError(f"{source}: names must be unique, got {Counter(names).most_common(1)[0][0]!r} twice")
