"""Times one call of each op on tiny tensors, in any tree of msdd_fast: the process behind ``op_overhead``.

    stdin                          stdout (one JSON value a line)
    ops                            names of the ops that run here
    time OP                        {"op": ns, "bound": ns, "C": ns or null}, each the median of LOOPS loops

"op" is ``ops.<op>(..., backend="cpu")``, "bound" the same op as an engine calls it (``engine.bound_ops.bind``), "C" the
function of ``msdd_fast._C`` alone, called with the arguments that it got from the op.

It runs over older revisions too, so it imports nothing of msdd_fast.bench.
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


def inputs() -> dict[str, tuple[Any, ...]]:
    """Arguments of each op: one or two tokens, one image of 8 x 8 pixels. No tensor is given twice, as in an engine."""

    from msdd_fast import native

    pack = getattr(native, "pack_linear", lambda weight: None)  # old revisions have no op that needs it

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape)

    def image() -> torch.Tensor:
        return randn(1, 3, 8, 8)

    def half() -> torch.Tensor:
        return torch.tensor(0.5)

    rows, patches, table, seeds = (1, 2, 64), (1, 1, 192), (1, 64), torch.arange(1)
    heads, maps = randn(1, 2, 3, 2, 64), randn(1, 32, 8, 8).contiguous(memory_format=torch.channels_last)
    q, k, v = heads.clone().unbind(2)
    gates, shifts = randn(4 * 64 * 16, 8), randn(2 * 64 * 16, 8)
    window = [randn(1, 4, 1, 40) for _ in range(3)]
    return {
        "attention": (q, k, v),
        "cfg_combine": (image(), image(), half()),
        "cfg_euler": (image(), image(), image(), half(), half()),
        "context_attention": (q, k, v, torch.zeros_like(q)),
        "euler_step": (image(), image(), half()),
        "final_step": (randn(*patches), randn(*patches), half(), 8, torch.float32),
        "gate_residual_norm_modulate": (randn(*rows), randn(*rows), randn(*table), randn(*table), randn(*table)),
        "group_norm_modulate_silu": (maps, 32, 1e-5),
        "norm_modulate": (randn(*rows), randn(*table), randn(*table)),
        "pixel_block": (
            *(randn(2, 64, 16), randn(2, 64, 16), randn(2, 8), gates, randn(4096), randn(16)),
            *(randn(64, 16), randn(64), randn(16, 64), randn(16), pack(gates)),
        ),
        "pixel_modulate": (randn(2, 64, 16), randn(2, 8), shifts, randn(2048), randn(16), pack(shifts)),
        "qk_norm_rope": (heads, torch.ones(1, 2, 64), torch.zeros(1, 2, 64), randn(2, 32), randn(2, 32)),
        "renoise_upsample": (image(), half(), half(), seeds, 1),
        "stage_transition": (randn(*patches), randn(*patches), half(), half(), half(), seeds, 1, 8),
        "sde_step": (image(), image(), half(), torch.tensor(0.25), seeds, 1),
        "sigma_gate": (randn(*rows), randn(*rows), randn(1, 2, 1), None, None, None, None, randn(64)),
        "start_noise": (seeds, (3, 8, 8)),
        "swiglu": (randn(2, 64), randn(2, 64)),
        "window_attention": (*window, randn(15, 15, 1), 2, 2),
    }


def calls_of(name: str, arguments: tuple[Any, ...]) -> dict[str, Callable[[], Any] | None]:
    """The three ways to call one op. Raises the op's own error if the C++ backend does not run it."""
    from msdd_fast import ops
    from msdd_fast.engine.bound_ops import bind

    op, bound = getattr(ops, name), getattr(bind(BACKEND), name)

    def call() -> Any:
        return op(*arguments, backend=BACKEND)

    return {"op": call, "bound": lambda: bound(*arguments), "C": bare_call(call)}


def bare_call(call: Callable[[], Any]) -> Callable[[], Any] | None:
    """The call of ``msdd_fast._C`` that ``call`` makes, with its arguments; None if it makes none."""
    from msdd_fast import _C  # type: ignore[attr-defined, unused-ignore]

    made: list[Callable[[], Any]] = []
    originals = {n: f for n, f in vars(_C).items() if callable(f) and not isinstance(f, type) and n[0] != "_"}

    def recorder(function: Callable[..., Any]) -> Callable[..., Any]:
        def record(*arguments: Any, **options: Any) -> Any:
            made.append(functools.partial(function, *arguments, **options))
            return made[-1]()

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
    from msdd_fast import ops

    torch.set_num_threads(1)
    with torch.no_grad():
        calls = {}
        for name, arguments in inputs().items():
            if hasattr(ops, name):
                calls[name] = calls_of(name, arguments)
        for line in sys.stdin:
            command, *words = line.split()
            answer: Any = list(calls)
            if command == "time":
                answer = {way: None if call is None else nanoseconds(call) for way, call in calls[words[0]].items()}
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
