"""How every program of ours ends: an exit code, and one line on stderr instead of a traceback for a user's mistake."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from msdd_fast.errors import MsddFastError
from msdd_fast.io.signals import TerminatedError, raise_if_received, remembered_signals


def run_program(run: Callable[[], int | None]) -> int:
    """The exit code: that of ``run`` (None is 0), or 1 for an error, 130 for Ctrl-C, 141 for a reader of the output who
    is gone, 143 for SIGTERM.

    Errors that are nobody's on purpose pass through, with their traceback.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started this
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 (open until the process ends)
    try:
        with remembered_signals():
            try:
                code = run()
                sys.stdout.flush()
                raise_if_received()
            except BaseException:
                raise_if_received()  # rather than what came of it
                raise
        return code or 0
    except MsddFastError as e:
        return _fail(f"error: {' '.join(str(e).split())}", 1)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except TerminatedError:
        return _fail("terminated", 143)
    except BrokenPipeError:
        _drop_output()
        return 141
    except OSError as e:  # a full disk, most often that of stdout
        _drop_output()
        where = "" if e.filename is None else f": {e.filename}"
        return _fail(f"error: {e.strerror or e}{where}", 1)


def _drop_output() -> None:
    """Python flushes stdout once more at exit, which must not fail again."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(message: str, code: int) -> int:
    print(f"msdd-fast: {message}", file=sys.stderr)
    return code
