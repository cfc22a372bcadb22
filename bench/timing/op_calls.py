"""What one call of an op costs on the CPU besides the work: ``python -m msdd_fast.bench.timing.op_calls``.

Every op with a native function is called on tensors so small that the work is next to nothing: through
``msdd_fast.ops``, which decides at every call; bound, as an engine calls it; and the extension's function alone, with
arguments that are ready. Python is what a bound call takes more than the latter: decision, marshalling and the
allocation of the result. Times are CPU seconds of the thread, which a busy machine does not stretch as it does others.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from msdd_fast import ops
from msdd_fast.backends.extension import load_extension
from msdd_fast.bench.report.results import aligned
from msdd_fast.engine.bound_ops import bind
from msdd_fast.native import _call

CALLS, ROUNDS = 500, 41


class Cost(NamedTuple):
    """Microseconds per call, medians."""

    op: str
    plain: float
    bound: float
    extension: float

    @property
    def python(self) -> float:
        """Of a bound call."""
        return self.bound - self.extension


def tiny() -> dict[str, tuple[Any, ...]]:
    """Arguments for every op that has a native function."""

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(0))

    x, rows, patches = randn(1, 2, 2, 2), randn(2, 16), randn(1, 1, 12)
    table, half, seeds = (lambda: randn(1, 16)), torch.tensor(0.5), torch.tensor([3])
    heads, norm, angle = randn(1, 2, 3, 1, 16), randn(1, 2, 16), randn(2, 8)
    q, k, v = (t.clone() for t in heads.unbind(2))
    return {
        "attention": (q, k, v),
        "cfg_combine": (x, x + 1, half),
        "cfg_euler": (x, x + 1, x - 1, half, half.clone()),
        "context_attention": (q, k, v, q + 1),
        "euler_step": (x, x + 1, half),
        "final_step": (patches, patches + 1, half, 2, torch.float32),
        "gate_residual_norm_modulate": (rows, rows + 1, table(), table(), table(), None),
        "group_norm_modulate_silu": (x, 1, 1e-5, randn(2), randn(2), None, None, True),
        "norm_modulate": (rows, table(), table(), None),
        "qk_norm_rope": (heads, norm, norm + 1, angle, angle + 1, None),
        "renoise_upsample": (x, half, half.clone(), seeds, 2, 0.25),
        "stage_transition": (patches, patches + 1, half, half.clone(), half.clone(), seeds, 2, 2, 0.25),
        "start_noise": (seeds, (1, 2, 2), torch.float32, 2),
        "swiglu": (rows, rows + 1),
        "window_attention": (q, k, v, randn(1, 1, 1), 1, 2),
    }


@torch.no_grad()
def measure(rounds: int = ROUNDS, calls: int = CALLS) -> list[Cost]:
    """All three for every op, in turns. Needs the extension."""
    arguments = tiny()
    choice = "auto," + ",".join(f"{name}=cpu" for name in arguments)
    bound, extension = bind(choice), load_extension()
    result = []
    for name, args in arguments.items():
        plain: Callable[..., Any] = getattr(ops, name)
        fast: Callable[..., Any] = getattr(bound, name)
        entry, ready = _captured(lambda plain=plain, args=args: plain(*args, backend="cpu"))
        native = getattr(extension, entry)
        fast(*args)
        runs = {
            "plain": lambda plain=plain, args=args: plain(*args, backend="cpu"),
            "bound": lambda fast=fast, args=args: fast(*args),
            "extension": lambda native=native, ready=ready: native(*ready),
        }
        times: dict[str, list[float]] = {key: [] for key in runs}
        for _ in range(rounds):
            for key, run in runs.items():
                times[key].append(_seconds(run, calls) * 1e6)
        result.append(Cost(name, *(statistics.median(times[key]) for key in ("plain", "bound", "extension"))))
    return result


def _seconds(run: Callable[[], Any], calls: int) -> float:
    begin = time.thread_time()
    for _ in range(calls):
        run()
    return (time.thread_time() - begin) / calls


def _captured(run: Callable[[], Any]) -> tuple[str, tuple[Any, ...]]:
    """Name and arguments of the extension's function that ``run`` calls. Its result is kept: the function writes it."""
    seen: list[tuple[str, tuple[Any, ...]]] = []
    original = _call.load_extension

    class Spy:
        def __getattr__(self, name: str) -> Callable[..., None]:
            def call(*args: Any) -> None:
                seen.append((name, args))
                getattr(original(), name)(*args)

            return call

    _call.load_extension = lambda: Spy()  # type: ignore[assignment, return-value]
    try:
        _KEPT.append(run())
    finally:
        _call.load_extension = original
    return seen[-1]


_KEPT: list[Any] = []


def main() -> None:
    """Print a table."""
    torch.set_num_threads(1)
    lines = [["op", "plain us", "bound us", "extension us", "Python us"]]
    for cost in measure():
        lines.append([cost.op, *(f"{t:.1f}" for t in (cost.plain, cost.bound, cost.extension, cost.python))])
    print("\n".join(aligned(lines)))


if __name__ == "__main__":
    main()
