"""A call in a process of its own, which can be stopped: torch.compile may take longer than anybody waits.

    with isolated("msdd_fast.bench.decode.models:compiled", {"case": {"model": "msdd-nano"}, ...}, limit=60) as call:
        call.first_s, call.result      # its first call: seconds, and its result
        call.stage_seconds()           # one more call: seconds of its stages, and of the rest

The process imports ``module:factory`` and calls it with the arguments (plain data). The factory returns a function from
``stage_done``, a callback for the end of every stage, to a tensor.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import itertools
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from msdd_fast.bench.timing.clock import now

Run = Callable[[Callable[[], None]], Tensor]


class IsolatedError(RuntimeError):
    """The process died, or did not finish its first call in time."""


class Isolated:
    """A running process. ``first_s`` and ``result`` are set once ``wait`` has returned."""

    def __init__(self, process: subprocess.Popen[str], folder: Path) -> None:
        self.process, self.folder, self.started = process, folder, now()
        self.first_s: float | None = None
        self.result: Tensor = torch.empty(0)

    def wait(self, limit: float) -> Isolated:
        """Wait for the first call; returns ``self``.

        Raises IsolatedError if it has not ended ``limit`` seconds after the start, or the process died.
        """
        try:
            (first,) = self._answer(max(0.0, self.started + limit - now()))
        except TimeoutError as error:
            raise IsolatedError(f"did not end in {limit:g} s") from error
        self.first_s, self.result = first, torch.load(self.folder / "result.pt", weights_only=True)
        return self

    def stage_seconds(self, staged: bool = True) -> list[float]:
        """Seconds of each stage of one more call and of the rest, by the clock of the process.

        Not ``staged``: seconds of the whole call alone.

        Raises IsolatedError if the process died.
        """
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # its answer says why
            self.process.stdin.write("staged\n" if staged else "whole\n")
            self.process.stdin.flush()
        return self._answer(None)

    def end(self) -> None:
        """End the process and its children, a compiler's among them."""
        if self.process.returncode is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.communicate()

    def _answer(self, limit: float | None) -> list[float]:
        assert self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], limit)[0]:
            raise TimeoutError
        line = self.process.stdout.readline()
        if not line:
            raise IsolatedError(f"died: {_message((self.folder / 'errors').read_text())}")
        answer: list[float] = json.loads(line)
        return answer


def _caches() -> Path:
    """The user's own folder for compiled code. In one that all users share, somebody else's code could wait."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "msdd-fast" / "inductor"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)
    return folder


@contextlib.contextmanager
def started(factory: str, arguments: Mapping[str, Any]) -> Iterator[Isolated]:
    """Start the process; ``wait`` for its first call. It ends with the block, and so do all of its children.

    Every spec has an Inductor cache of its own, which is removed if the process did not finish: a killed compiler
    leaves half a library behind, on which every user of a shared cache would fail.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        spec = {"factory": factory, "arguments": arguments, "threads": torch.get_num_threads()}
        key = hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()[:16]
        cache = _caches() / key
        with (folder / "errors").open("w") as errors:
            process = subprocess.Popen(
                [sys.executable, "-m", "msdd_fast.bench.timing.isolated", json.dumps({**spec, "folder": name})],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache)},
                start_new_session=True,  # a compiler has children, which must not outlive it
            )
            call = Isolated(process, folder)
            try:
                yield call
            finally:
                call.end()
                if call.first_s is None:
                    shutil.rmtree(cache, ignore_errors=True)


@contextlib.contextmanager
def isolated(factory: str, arguments: Mapping[str, Any], limit: float) -> Iterator[Isolated]:
    """``started``, with the first call done. Raises IsolatedError if that takes more than ``limit`` seconds."""
    with started(factory, arguments) as call:
        yield call.wait(limit)


def _message(errors: str) -> str:
    """The last line that names an exception, else the last one."""
    lines = [line.strip() for line in errors.splitlines() if line.strip()] or ["no message"]
    return next((line for line in reversed(lines) if re.match(r"[\w.]+(Error|Exception): ", line)), lines[-1])


def _timed(run: Run, staged: bool) -> list[float]:
    """Seconds of the stages of one call and of the rest; on a GPU the end of each stage waits for the device."""
    times = [now()]
    run((lambda: times.append(now())) if staged else (lambda: None))
    times.append(now())
    return [b - a for a, b in itertools.pairwise(times)]


def main() -> None:
    """The process: its argument is the spec; every line of its input asks for one call."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not look like an answer
    spec = json.loads(sys.argv[1])
    torch.set_num_threads(spec["threads"])
    module, _, name = spec["factory"].partition(":")
    run: Run = getattr(importlib.import_module(module), name)(**spec["arguments"])
    begin = now()
    torch.save(run(lambda: None).float().cpu(), Path(spec["folder"]) / "result.pt")
    print(json.dumps([now() - begin]), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(_timed(run, staged=line == "staged\n")), file=answers, flush=True)


if __name__ == "__main__":
    main()
