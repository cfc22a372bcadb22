"""One run at a time in a folder."""

from __future__ import annotations

import logging
import os
import platform
import weakref
from pathlib import Path
from typing import ClassVar

from msdd_fast.errors import InputError

log = logging.getLogger(__name__)


class RunLock:
    """Holds ``out``/.lock, so that another process's run in ``out`` is refused. Use ``RunLock.take``.

    Trainers of one process share it; it ends with the last of them, or with the process. The kernel's record locks do
    not pass to data-loading workers, so a worker that outlives a killed run holds nothing.
    """

    _held: ClassVar[weakref.WeakValueDictionary[Path, RunLock]] = weakref.WeakValueDictionary()

    def __init__(self, out: Path) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self._file = open(out / ".lock", "a+")  # noqa: SIM115 (it stays open)
        try:
            import fcntl
        except ImportError:  # Windows: no lock
            return
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            self._file.seek(0)
            who = self._file.read().strip()
            self._file.close()
            raise InputError(
                f"out {out} is in use: another run{f', {who},' if who else ''} writes into it; wait for it or choose "
                "another folder"
            ) from None
        except OSError as e:  # a file system without locks
            log.warning("%s cannot be locked (%s): make sure that no other run writes into it", out, e.strerror or e)
            return
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {platform.node()}\n")
        self._file.flush()

    @classmethod
    def take(cls, out: Path) -> RunLock:
        """The lock of the folder, which is made if needed. Raises InputError if another process has it."""
        key = out.absolute()
        lock = cls._held.get(key)
        if lock is None:
            try:
                lock = cls(out)
            except OSError as e:
                raise InputError(f"out must be a writable folder, got {out}: {e.strerror or e}") from e
            cls._held[key] = lock
        return lock

    def __del__(self) -> None:
        file = getattr(self, "_file", None)
        if file is not None:
            file.close()
