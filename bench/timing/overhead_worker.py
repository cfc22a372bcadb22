"""Times one call of each op on tiny tensors, in any tree of msdd_fast: the process behind ``op_overhead``.

Its argument is a file with the arguments of every op (``op_overhead.examples``).

    stdin                          stdout (one JSON value a line)
    ops                            names of the ops that run here
    time OP                        {"op": ns, "bound": ns, "C": ns or null}, each the median of LOOPS loops

"op" is ``ops.<op>(..., backend="cpu")``, "bound" the same op as an engine calls it (``engine.bound_ops.bind``), "C" the
function of ``msdd_fast._C`` alone, called with the arguments that it got from the op.

It runs over older revisions too: it imports nothing of msdd_fast.bench, and leaves out an op that is not there or takes
other arguments.
"""

from __future__ import annotations

import functools
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

LOOPS, CALLS = 5, 1000
BACKEND = "cpu"


def calls_of(name: str, arguments: tuple[Any, ...]) -> dict[str, Callable[[], Any] | None]:
    """The three ways to call one op. Raises the op's own error if the C++ backend does not run it."""
    from msdd_fast import ops
    from msdd_fast.engine.bound_ops import bind

    op, bound = getattr(ops, name), getattr(bind(BACKEND), name)

    def call() -> Any:
        return op(*arguments, backend=BACKEND)

    return {"op": call, "bound": functools.partial(bound, *arguments), "C": bare_call(call)}


def bare_call(call: Callable[[], Any]) -> Callable[[], Any] | None:
    """The call of ``msdd_fast._C`` that ``call`` makes, with its arguments; None if it makes none."""
    from msdd_fast import _C  # type: ignore[attr-defined, unused-ignore]

    made: list[Callable[[], Any]] = []
    originals = {n: f for n, f in vars(_C).items() if callable(f) and not isinstance(f, type) and n[0] != "_"}

    def recorder(function: Callable[..., Any]) -> Callable[..., Any]:
        def record(*arguments: Any, **options: Any) -> Any:
            made.append(functools.partial(function, *arguments, **options))
            result = made[-1]()
            return recorder(result) if callable(result) else result  # a prepared function: its call is what counts

        return record

    for name, function in originals.items():
        setattr(_C, name, recorder(function))
    try:
        result = call()
    finally:
        for name, function in originals.items():
            setattr(_C, name, function)
    if not made:
        return None
    bare = made[-1]
    bare.result = result  # type: ignore[attr-defined]  # keeps it alive: the arguments hold its address
    return bare


def nanoseconds(call: Callable[[], Any]) -> float:
    """CPU time of one call: the median of LOOPS loops of CALLS calls. Other load on the machine does not count."""
    loops = []
    for _ in range(LOOPS):
        begin = time.thread_time_ns()
        for _ in range(CALLS):
            call()
        loops.append((time.thread_time_ns() - begin) / CALLS)
    return statistics.median(loops)


def main() -> None:
    torch.set_num_threads(1)
    with torch.no_grad():
        calls = {}
        for name, arguments in torch.load(sys.argv[1], weights_only=True).items():
            try:
                calls[name] = calls_of(name, arguments)
            except (AttributeError, TypeError, ValueError) as error:
                print(f"{name} is left out: {error}", file=sys.stderr)
        for line in sys.stdin:
            command, *words = line.split()
            answer: Any = list(calls)
            if command == "time":
                answer = {way: None if call is None else nanoseconds(call) for way, call in calls[words[0]].items()}
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
