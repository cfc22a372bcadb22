"""What bulk work reads: images and latents in folders, files and WebDataset shards. Listed here, loaded by workers."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from msdd_fast.errors import InputError
from msdd_fast.io.files import as_path
from msdd_fast.io.images import IMAGE_SUFFIXES, find_image_files, is_searched, load_image, walk
from msdd_fast.io.latents import check_names, latents_head, load_rows, unique_names

NPY = frozenset({".npy"})
DIGEST_ROWS = 4096


class Ref(NamedTuple):
    """A file, or ``size`` bytes of one from ``offset``."""

    path: str
    offset: int = 0
    size: int = -1

    def read(self) -> bytes:
        with open(self.path, "rb") as f:
            f.seek(self.offset)
            return f.read(self.size)

    def __str__(self) -> str:
        return self.path if self.size < 0 else f"{self.path} at byte {self.offset}"


def load_ref(ref: Ref) -> Image.Image:
    """The image there, as ``load_image`` gives it."""
    return load_image(ref.path) if ref.size < 0 else load_image(str(ref), ref.read())


def list_images(source: str | Path) -> tuple[list[Ref], list[str]]:
    """Images and their names: of a file, a folder (searched), a WebDataset shard (.tar), or a folder with shards.

    What is in a shard is called SHARD/MEMBER, without suffixes. Raises InputError if there are no images.
    """
    path = as_path("source", source)
    shards = _shards(path)
    files = [] if path in shards else find_image_files(path, required=not shards)
    root = path if path.is_dir() else path.parent
    refs, paths = [Ref(str(f)) for f in files], [f.relative_to(root) for f in files]
    for shard in shards:
        members = _members(shard, IMAGE_SUFFIXES)
        refs += [ref for _, ref in members]
        paths += [Path(shard.stem, name) for name, _ in members]
    return refs, unique_names(paths, Path())


class Piece(NamedTuple):
    """Rows ``begin`` to ``end`` of the latents in a safetensors file, or one array in a shard (its bytes)."""

    path: str
    begin: int
    end: int
    in_shard: bool

    def load(self) -> Tensor:
        """Latents (n, ...). Raises InputError if they cannot be read."""
        if not self.in_shard:
            return load_rows(self.path, self.begin, self.end)
        ref = Ref(self.path, self.begin, self.end - self.begin)
        try:
            return torch.from_numpy(np.load(io.BytesIO(ref.read()), allow_pickle=False))[None]
        except (OSError, ValueError, EOFError, TypeError) as e:
            raise InputError(f"{ref} is not a readable .npy array: {e}") from e


class LatentSource(NamedTuple):
    """Latents in order of their global index: names, the pieces that hold them, and how many there are up to the end of
    each piece."""

    names: list[str]
    pieces: list[Piece]
    ends: list[int]

    def part(self, first: int, last: int) -> list[Piece]:
        """Pieces that hold the latents from ``first`` to ``last``."""
        found: list[Piece] = []
        number = bisect_right(self.ends, first)  # of the first piece that ends behind it
        start = self.ends[number - 1] if number else 0
        while start < last and number < len(self.pieces):
            piece, end = self.pieces[number], self.ends[number]
            if start < end:
                begin, stop = (piece.begin - start + i for i in (max(first, start), min(last, end)))
                found.append(piece if piece.in_shard else piece._replace(begin=begin, end=stop))
            number, start = number + 1, end
        return found

    def digest(self) -> str:
        """What ``record.digest`` gives for the names and the latents as one tensor, read a part at a time."""
        found = hashlib.sha256(json.dumps(self.names).encode())
        if self.pieces[0].in_shard:
            for piece in self.pieces:
                found.update(Ref(piece.path, piece.begin, piece.end - piece.begin).read())
            return found.hexdigest()[:16]
        example = self.pieces[0].load()[:1]
        found.update(f"z {example.dtype} {(len(self.names), *example.shape[1:])}".encode())
        for piece in self.pieces:
            for begin in range(piece.begin, piece.end, DIGEST_ROWS):
                rows = load_rows(piece.path, begin, min(begin + DIGEST_ROWS, piece.end))
                found.update(rows.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return found.hexdigest()[:16]


def list_latents(source: str | Path, is_one_set: bool) -> LatentSource:
    """Latents of a .safetensors file or a folder of them, or WebDataset shards (.tar) of .npy arrays.

    ``is_one_set`` says that a folder's files are shards of ``encode``, whose names need no file's name before them.
    Raises InputError for none, for files that disagree in shape or dtype, and for names that are there twice.
    """
    path = as_path("source", source)
    shards = _shards(path)
    names: list[str] = []
    pieces: list[Piece] = []
    counts: list[int] = []
    if shards:
        for shard in shards:
            members = _members(shard, NPY)
            names += [str(PurePosixPath(shard.stem, name).with_suffix("")) for name, _ in members]
            pieces += [Piece(str(shard), ref.offset, ref.offset + ref.size, True) for _, ref in members]
        counts = [1] * len(pieces)
    else:
        files = [path]
        if path.is_dir():
            files = sorted(f for f in path.glob("*.safetensors") if not f.name.startswith("."))
            if not files:
                raise InputError(f"no .safetensors files and no .tar shards in {path}")
        kinds = set()
        for file in files:
            head = latents_head(file)
            kinds.add(f"{head.dtype} {head.shape[1:]}")
            if len(kinds) > 1:
                raise InputError(f"latents files must agree in shape and dtype, got {' and '.join(sorted(kinds))}")
            prefix = f"{file.stem}/" if path.is_dir() and not is_one_set else ""
            names += [f"{prefix}{name}" for name in head.names]
            pieces.append(Piece(str(file), 0, head.shape[0], False))
            counts.append(head.shape[0])
    check_names(names, sum(counts), path)
    return LatentSource(names, pieces, list(accumulate(counts)))


def load_pieces(pieces: Sequence[Piece]) -> Tensor:
    """Their latents as one tensor. Raises InputError if they cannot be read, or differ in shape."""
    parts = [piece.load() for piece in pieces]
    shapes = sorted({tuple(p.shape[1:]) for p in parts})
    if len(shapes) > 1:
        raise InputError(f"latents must agree in shape, got {' and '.join(map(str, shapes))}")
    return torch.cat(parts)


def _shards(path: Path) -> list[Path]:
    if path.is_file():
        return [path] if path.suffix.lower() == ".tar" else []
    if not path.is_dir():
        return []
    tar = frozenset({".tar"})
    return sorted(p for p in walk(path) if is_searched(p.relative_to(path), tar) and p.is_file())


def _members(shard: Path, suffixes: frozenset[str]) -> list[tuple[str, Ref]]:
    """Names and places of the members with one of ``suffixes``. Raises InputError if there are none."""
    try:
        with tarfile.open(shard, "r:") as tar:
            members = [m for m in tar if m.isfile() and not m.issparse()]
    except (tarfile.TarError, OSError) as e:
        raise InputError(f"shard {shard} is not a readable, uncompressed tar file: {e}") from e
    found = [
        (m.name, Ref(str(shard), m.offset_data, m.size))
        for m in members
        if is_searched(PurePosixPath(m.name), suffixes)
    ]
    if not found:
        raise InputError(f"shard {shard} holds no {', '.join(sorted(suffixes))}")
    return found
