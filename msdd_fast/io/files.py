"""The one way in which files are written, and how JSON is read."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import stat
import sys
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError

from msdd_fast.errors import InputError
from msdd_fast.io.signals import raise_if_received

__all__ = [
    "STDOUT",
    "as_path",
    "atomic_write",
    "is_standard_output",
    "parse_json",
    "read_json",
    "read_limited",
    "require_writable",
    "temporary_sibling",
]

STDOUT = "-"
"""The path that means standard output, wherever a single file is written."""
_MAX_BYTES = 256 * 2**20


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives a temporary path of the same suffix, whose content becomes that of ``path`` if the block succeeds.

    A regular file is replaced in one step, after its content has reached the disk: a reader, or a machine that loses
    its power, finds the old file or the new one. Symbolic links are followed, folders are made as needed, and the mode
    follows the umask. Devices, FIFOs, open descriptors such as /dev/stdout, and ``-``, which is standard output, are
    written into. After Ctrl-C or SIGTERM nothing is written any more, even if the signal's exception got lost.

    Raises InputError if the file cannot be written; nothing of it is left behind then.
    """
    as_path("path", path)
    temporary = None
    try:
        target, in_place = _destination(path)
        if in_place:
            temporary = Path(tempfile.gettempdir(), f"{uuid.uuid4().hex}{target.suffix}")
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = temporary_sibling(target)
        # Made here rather than by the block, since only open() applies the umask: safetensors asks for mode 0600.
        created = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        mode = stat.S_IMODE(os.fstat(created).st_mode)
        os.close(created)
        yield temporary
        raise_if_received()
        if in_place:
            _copy_into(temporary, path)
            return
        os.chmod(temporary, mode)
        _sync(temporary)
        try:
            os.replace(temporary, target)
        except OSError as e:
            if e.errno != errno.EBUSY:
                raise
            _copy_into(temporary, target)  # the file itself is a mount point
        with suppress(OSError):  # not every file system can
            _sync(target.parent)
    except BrokenPipeError:
        raise
    except (OSError, SafetensorError) as e:
        raise InputError(f"cannot write {path}: {getattr(e, 'strerror', None) or e}") from e
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def temporary_sibling(path: Path) -> Path:
    """A hidden path in the same folder that nobody else uses."""
    return path.with_name(f".{uuid.uuid4().hex}{path.suffix}")


def require_writable(path: str | os.PathLike[str]) -> None:
    """Fail before the work, not after it: InputError if ``path`` is a folder or cannot be written."""
    if str(as_path("output", path)) == STDOUT:
        return _require_stdout()
    try:
        target, in_place = _destination(path)
        if in_place:
            if not is_standard_output(path) and not os.access(target, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            return
        if target.is_dir():
            raise InputError(f"output must be a file, got the folder {target}")
        folder = target.parent
        while not folder.exists():
            folder = folder.parent
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as e:
        raise InputError(f"cannot write {path}: {e.strerror or e}") from e


def is_standard_output(path: str | os.PathLike[str]) -> bool:
    """Whether writing to ``path`` writes to standard output; then progress and messages belong on stderr."""
    return os.fspath(path) in (STDOUT, "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1")


def as_path(name: str, path: object) -> Path:
    """``path`` as a Path. Raises InputError that names the argument for another type and for names no file can have."""
    if not isinstance(path, (str, os.PathLike)):
        raise InputError(f"{name} must be a str or a path, got {type(path).__name__}")
    text = os.fspath(path)
    if not isinstance(text, str):
        raise InputError(f"{name} must be a str or a path of text, got {type(text).__name__}")
    if "\0" in text:
        raise InputError(f"{name} must not hold a NUL character, got {text!r}")
    if not text:
        raise InputError(f"{name} must name a file or a folder, got an empty str")
    return Path(text)


def read_json(path: str | os.PathLike[str]) -> Any:
    """The content of a JSON file. Raises as ``read_limited`` and ``parse_json``."""
    return parse_json(read_limited(path))


def read_limited(path: str | os.PathLike[str]) -> bytes:
    """The content of a small file. Raises OSError if it cannot be read, ValueError if it has more than 256 MiB."""
    with open(path, "rb") as f:
        if os.fstat(f.fileno()).st_size > _MAX_BYTES:
            raise ValueError(f"larger than {_MAX_BYTES} bytes")
        return f.read(_MAX_BYTES)


def parse_json(data: bytes) -> Any:
    """What a JSON text says. Raises ValueError if it is none, is nested too deeply, or names one key twice."""
    try:
        return json.loads(data, object_pairs_hook=_unique_keys)
    except RecursionError as e:
        raise ValueError("nested too deeply") from e


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"key {key!r} is there twice")
        found[key] = value
    return found


def _destination(path: str | os.PathLike[str]) -> tuple[Path, bool]:
    """The path behind all links, and whether it is to be written into rather than replaced."""
    if os.fspath(path) == STDOUT or _is_descriptor(os.path.abspath(path)):
        return Path(path), True
    target = Path(os.path.realpath(path))
    try:
        mode = target.stat().st_mode
    except FileNotFoundError:
        return target, False
    return target, not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)


def _is_descriptor(path: str) -> bool:
    """Whether a path names an open descriptor, as /dev/stdout does: behind it may be a regular file, which whoever
    redirected the output holds open and reads."""
    for _ in range(40):  # as many links as Linux follows
        folder = os.path.realpath(os.path.dirname(path))
        if folder == "/dev/fd" or re.fullmatch(r"/proc/\d+(/task/\d+)?/fd", folder):
            return True
        if not os.path.islink(path):
            return False
        path = os.path.join(folder, os.readlink(path))
    return False


def _copy_into(source: Path, path: str | os.PathLike[str]) -> None:
    """Append to what is written into, such as a terminal, or the redirected output; a regular file is rewritten."""
    with open(source, "rb") as read:
        if os.fspath(path) == STDOUT:
            return _copy_to_stdout(read)
        if sys.stdout is not None:
            sys.stdout.flush()
        replaced = os.O_TRUNC if os.path.isfile(path) and not _is_descriptor(os.path.abspath(path)) else os.O_APPEND
        with os.fdopen(os.open(path, os.O_WRONLY | replaced), "wb") as written:
            shutil.copyfileobj(read, written)


def _copy_to_stdout(read: BinaryIO) -> None:
    """Behind what was printed before. Bytes need a ``sys.stdout`` with a buffer; io.StringIO and notebooks lack it."""
    _require_stdout()
    sys.stdout.flush()
    if hasattr(sys.stdout, "buffer"):
        shutil.copyfileobj(read, sys.stdout.buffer)
    else:
        try:
            sys.stdout.write(read.read().decode())
        except UnicodeDecodeError:
            raise InputError("output must be a file here, got -: sys.stdout takes text only") from None
    sys.stdout.flush()


def _require_stdout() -> None:
    if sys.stdout is None:
        raise InputError("output must be a file here, got -: the process has no standard output")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
