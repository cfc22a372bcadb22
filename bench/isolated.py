"""A call in a process of its own, which can be stopped: torch.compile may take longer than anybody waits.

    with isolated("msdd_fast.bench.decode:compiled", {"model": "msdd-nano", ...}, limit=60) as call:
        call.first_s, call.result      # its first call: seconds, and what it gave
        call.laps()                    # one more call: seconds between its marks

The process imports ``module:factory``, calls it with the arguments (plain data) and gets a function, which takes
``mark``, a function to call after every part of its work, and gives a tensor.
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

from msdd_fast.bench.timing import now

Run = Callable[[Callable[[], None]], Tensor]


class IsolatedError(RuntimeError):
    """The process did not get through its first call in time, or died."""


class Isolated:
    """A running process, past its first call."""

    def __init__(self, process: subprocess.Popen[str], first_s: float, result: Tensor) -> None:
        self.process, self.first_s, self.result = process, first_s, result

    def laps(self, marked: bool = True) -> list[float]:
        """Seconds of each part of one more call, by the clock of the process; of the whole call if not ``marked``."""
        assert self.process.stdin is not None
        self.process.stdin.write("marked\n" if marked else "whole\n")
        self.process.stdin.flush()
        laps: list[float] = _answer(self.process, None)
        return laps


@contextlib.contextmanager
def isolated(factory: str, arguments: Mapping[str, Any], limit: float) -> Iterator[Isolated]:
    """Start it and wait for its first call. The process and all of its children end with the block.

    Inductor's cache is one of its own for every spec: a compiler that is killed leaves half a library there, on which
    everybody who shares the cache would fail. So that of a process which was not done is removed.

    Raises IsolatedError if the first call has not ended ``limit`` seconds after the start, or the process dies.
    """
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.pt"
        spec = {"factory": factory, "arguments": arguments, "threads": torch.get_num_threads(), "result": str(result)}
        key = hashlib.sha256(json.dumps({**spec, "result": ""}, sort_keys=True).encode()).hexdigest()[:16]
        cache = Path(tempfile.gettempdir()) / f"msdd-fast-inductor-{os.getuid()}" / key
        done = False
        with (Path(folder) / "errors").open("w+") as errors:
            process = subprocess.Popen(
                [sys.executable, "-m", "msdd_fast.bench.isolated", json.dumps(spec)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache)},
                start_new_session=True,  # a compiler has children, which must not outlive it
            )
            try:
                (first,) = _answer(process, limit)
                done = True
                yield Isolated(process, first, torch.load(result, weights_only=True))
            except EOFError as error:
                errors.seek(0)
                raise IsolatedError(f"died: {_message(errors.read())}") from error
            except TimeoutError as error:
                raise IsolatedError(f"did not end in {limit:g} s") from error
            finally:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
                if not done:
                    shutil.rmtree(cache, ignore_errors=True)


def _message(errors: str) -> str:
    """The last line that names an exception, else the last one."""
    lines = [line.strip() for line in errors.splitlines() if line.strip()] or ["no message"]
    return next((line for line in reversed(lines) if re.match(r"[\w.]+(Error|Exception): ", line)), lines[-1])


def _answer(process: subprocess.Popen[str], limit: float | None) -> list[float]:
    assert process.stdout is not None
    if not select.select([process.stdout], [], [], limit)[0]:
        raise TimeoutError
    line = process.stdout.readline()
    if not line:
        raise EOFError
    answer: list[float] = json.loads(line)
    return answer


def main() -> None:
    """The process: the spec is its argument; every line that it reads asks for one call."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not look like an answer
    spec = json.loads(sys.argv[1])
    torch.set_num_threads(spec["threads"])
    module, _, name = spec["factory"].partition(":")
    run: Run = getattr(importlib.import_module(module), name)(**spec["arguments"])
    begin = now()
    torch.save(run(lambda: None).float().cpu(), spec["result"])
    print(json.dumps([now() - begin]), file=answers, flush=True)
    for line in sys.stdin:
        marks = [now()]
        # On a GPU a mark waits for the device.
        run((lambda marks=marks: marks.append(now())) if line == "marked\n" else lambda: None)
        marks.append(now())
        print(json.dumps([b - a for a, b in itertools.pairwise(marks)]), file=answers, flush=True)


if __name__ == "__main__":
    main()
