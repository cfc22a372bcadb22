"""Where training images are: folders, tar shards, and commands that write a shard."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tarfile
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple, overload

import numpy as np

from msdd_fast.errors import InputError
from msdd_fast.io.files import atomic_write
from msdd_fast.io.images import find_image_files, is_searched, no_images, passed_over, report_passed_over, walk


class ImageRef(NamedTuple):
    """Where an encoded image is: ``size`` bytes of ``path`` from ``offset``, or the whole file if ``size`` is None."""

    path: Path
    offset: int = 0
    size: int | None = None

    def read(self) -> bytes:
        with open(self.path, "rb") as f:
            f.seek(self.offset)
            return f.read() if self.size is None else f.read(self.size)

    def __str__(self) -> str:
        return str(self.path) if self.size is None else f"{self.path} at byte {self.offset}"


class ImageRefs(Sequence[ImageRef]):
    """Image references in five arrays: 10 M of them are shared by all data-loading workers.

    A list of Python objects would be copied into every worker, page by page, as their reference counts change.
    """

    def __init__(self, refs: Iterable[ImageRef]) -> None:
        names, ends, path_of, offsets, sizes = bytearray(), array("q"), array("q"), array("q"), array("q")
        self._sha256: str | None = None
        last = None
        for ref in refs:
            if ref.path != last:
                last = ref.path
                names += os.fsencode(last)
                ends.append(len(names))
            path_of.append(len(ends) - 1)
            offsets.append(ref.offset)
            sizes.append(-1 if ref.size is None else ref.size)
        self._names = np.array(names, np.uint8)
        self._ends, self._path_of, self._offsets, self._sizes = (
            np.array(a, np.int64) for a in (ends, path_of, offsets, sizes)
        )

    def __len__(self) -> int:
        return len(self._path_of)

    @overload
    def __getitem__(self, index: int) -> ImageRef: ...
    @overload
    def __getitem__(self, index: slice) -> list[ImageRef]: ...
    def __getitem__(self, index: int | slice) -> ImageRef | list[ImageRef]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        path, size = int(self._path_of[index]), int(self._sizes[index])
        start = int(self._ends[path - 1]) if path else 0
        name = os.fsdecode(self._names[start : int(self._ends[path])].tobytes())
        return ImageRef(Path(name), int(self._offsets[index]), None if size < 0 else size)

    def sha256(self) -> str:
        """A hash of all references, in hexadecimal."""
        if self._sha256 is None:
            digest = hashlib.sha256()
            for part in (self._names, self._ends, self._path_of, self._offsets, self._sizes):
                digest.update(part.data)
            self._sha256 = digest.hexdigest()
        return self._sha256


def find_images(sources: Sequence[str | Path], cache: str | Path | None = None) -> list[ImageRef]:
    """Every image in the given folders (recursive) and .tar shards, in a fixed order.

    A folder gives the images in it, then those of the shards in it. Hidden files, folders and members of shards, such
    as macOS's ``._NAME`` and ``__MACOSX``, are left out.

    A source may name many shards, ``train-{000..146}.tar``. It may also be a command that writes a shard to its
    standard output, ``pipe:curl -sf https://host/train-{000..146}.tar``. The command runs once; its shard stays in the
    folder ``cache``.

    Raises InputError if a source does not exist, cannot be read, or contains no image.
    """
    refs: list[ImageRef] = []
    for source in (s for given in sources for s in expand_braces(str(given))):
        if source.startswith("pipe:"):
            shard = fetch(source.removeprefix("pipe:"), cache)
            refs += _tar_images(shard, f"{source} (kept as {shard}; delete that to run the command again)")
        elif Path(source).is_dir():
            refs += _folder_images(source)
        elif source.lower().endswith(".tar") and Path(source).is_file():
            refs += _tar_images(Path(source), source)
        else:
            raise InputError(f"data must be folders or .tar shards, got {source}")
    if not refs:
        raise InputError("data must name at least one folder or .tar shard, got none")
    return refs


def expand_braces(source: str) -> list[str]:
    """``a{08..10}b`` to ["a08b", "a09b", "a10b"]; several ranges multiply."""
    found = re.search(r"\{(\d+)\.\.(\d+)\}", source)
    if found is None:
        return [source]
    first, last = found.groups()
    numbers = range(int(first), int(last) + 1)
    if not numbers:
        raise InputError(f"data must name shards in rising order, got {found[0]} in {source}")
    width = len(first) if first.startswith("0") else 0
    head, tail = source[: found.start()], source[found.end() :]
    return [f"{head}{i:0{width}d}{rest}" for i in numbers for rest in expand_braces(tail)]


def fetch(command: str, cache: str | Path | None) -> Path:
    """The shard that ``command`` writes to its standard output, in ``cache``; runs the command if it is not there yet.

    Processes of one machine take turns. Only a shard that reads to its end is kept. Raises InputError with the last
    line of stderr if the command fails, and on a system without the module ``fcntl``, such as Windows.
    """
    if cache is None:
        raise InputError(f"data from a pipe needs cache, a folder for its shards, got none for pipe:{command}")
    try:
        import fcntl
    except ImportError as e:
        raise InputError(
            f"data from a pipe needs Python's module fcntl, which this system lacks: write the shard of pipe:{command} "
            "to a file and name that"
        ) from e
    target = Path(cache) / f"{hashlib.sha256(command.encode()).hexdigest()[:24]}.tar"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(target.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if target.exists():
                return target
            with atomic_write(target) as temporary:
                with open(temporary, "wb") as f:
                    shell = ["bash", "-o", "pipefail", "-c"] if shutil.which("bash") else ["sh", "-c"]
                    done = subprocess.run(
                        [*shell, command], stdout=f, stderr=subprocess.PIPE, text=True, errors="replace"
                    )
                if done.returncode:
                    said = done.stderr.strip().splitlines()
                    raise InputError(
                        f"data shard pipe:{command} is unreachable: exit status {done.returncode}"
                        f"{': ' + said[-1] if said else ''}"
                    )
                _check_whole(temporary, f"pipe:{command}")
    except OSError as e:
        raise InputError(f"cannot keep the shard of pipe:{command} in {cache}: {e.strerror or e}") from e
    return target


def _folder_images(source: str) -> list[ImageRef]:
    folder, tar = Path(source), frozenset({".tar"})
    named = (p for p in walk(folder) if p.suffix.lower() in tar)
    shards = sorted(p for p in named if is_searched(p.relative_to(folder), tar) and p.is_file())
    refs = [ImageRef(p) for p in find_image_files(folder, required=not shards)]
    return refs + [ref for shard in shards for ref in _tar_images(shard, str(shard))]


def _check_whole(path: Path, name: str) -> None:
    """Raises InputError unless the file is a tar file that ends as one does, with a block of zeros."""
    try:
        with tarfile.open(path, "r:") as tar:
            tar.getmembers()
            end = tar.offset
        with open(path, "rb") as f:
            f.seek(end)
            if f.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError("it is cut off: the block of zeros at its end is missing")
    except (tarfile.TarError, OSError) as e:
        raise InputError(f"data shard {name} is not a readable, uncompressed tar file: {e}") from e


def _tar_images(path: Path, name: str) -> list[ImageRef]:
    try:
        with tarfile.open(path, "r:") as tar:
            members = [(PurePosixPath(m.name), m) for m in tar if m.isfile() and not m.issparse()]
    except (tarfile.TarError, OSError) as e:
        raise InputError(f"data shard {name} is not a readable, uncompressed tar file: {e}") from e
    refs = [ImageRef(path, m.offset_data, m.size) for member, m in members if is_searched(member)]
    others = passed_over(member for member, _ in members)
    if not refs:
        raise InputError(f"data shard {name} holds {no_images(others)}")
    report_passed_over(name, others)
    return refs
