"""Code in processes that have imported PyTorch and nothing else: forks of one that waits, so that none imports it anew.

``python -m tests.fresh`` is that process; the fixture ``fresh`` of conftest.py talks to it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

SECONDS = 300  # then a process is ended, by SIGALRM
ROOT = Path(__file__).resolve().parent.parent


class Fresh:
    """``fresh(code, NAME=value, ...)`` runs code with these environment variables: a CompletedProcess with its text.

    ``check`` as of subprocess.run.
    """

    def __init__(self) -> None:
        command = [sys.executable, "-m", "tests.fresh"]
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )

    def __call__(self, code: str, check: bool = False, **environment: str) -> subprocess.CompletedProcess[str]:
        with tempfile.TemporaryDirectory() as folder:
            # The variables of this test, not those of the first one.
            job = {"code": code, "environment": {**os.environ, **environment}, "folder": folder}
            self.process.stdin.write(json.dumps(job) + "\n")
            status = int(self.process.stdout.readline())
            out, err = ((Path(folder) / name).read_text() for name in ("out", "err"))
        done = subprocess.CompletedProcess([code], status, out, err)
        if check:
            assert status == 0, out + err
        return done

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


def serve() -> None:
    """One fork for each line of stdin; prints its exit code when it is done."""
    import torch  # noqa: F401  (what the forks need not import)

    for line in sys.stdin:
        job = json.loads(line)
        pid = os.fork()
        if pid == 0:
            os._exit(run(**job))
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


def run(code: str, environment: dict[str, str], folder: str) -> int:
    """What ``python -c code`` does, with its outputs in files; returns its exit code."""
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(os.path.join(folder, name), os.O_WRONLY | os.O_CREAT), descriptor)
    signal.alarm(SECONDS)
    os.environ.clear()
    os.environ.update(environment)
    status: object = 0
    try:
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return status if isinstance(status, int) else 1


if __name__ == "__main__":
    serve()
