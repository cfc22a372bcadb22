"""Where the time of a decode goes: seconds, bytes and FLOP per scale and kernel.

``torch.profiler`` times one pass over the work; a dispatch mode counts the bytes and FLOP of every operator in another.
Both are joined by scale and name. CUDA graphs are off, since a replayed graph has no operators.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from msdd_fast import profiling
from msdd_fast.bench.timing.trace import NO_KERNEL, PACKED_LINEAR, touched_bytes

ROUNDS = 5
PRODUCTS = ("aten::mm", "aten::addmm")
Key = tuple[str, str]
"""(scale, kernel)"""


@dataclass
class Row:
    """All calls of one kernel at one scale."""

    scale: str
    kernel: str
    calls: int = 0
    seconds: float = 0.0
    bytes: int = 0
    flops: int = 0


class Counter(TorchDispatchMode):
    """FLOP and bytes by key while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[Key, int] = defaultdict(int)
        self.flops: dict[Key, int] = defaultdict(int)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        packet = func.overloadpacket.__name__
        if func.is_view or packet.removesuffix("_") in NO_KERNEL:
            return out
        if func.namespace == "msdd_fast":
            name = f"{packet} [{func._overloadname.replace('_', '-')}]"
        else:
            name = _kernel(f"{func.namespace}::{packet}", [list(a.shape) for a in args if isinstance(a, Tensor)])
        key = (_scale(profiling.current()), name)
        self.bytes[key] += touched_bytes(args, kwargs, out)
        self.flops[key] += _flops(func, args, kwargs, out)
        return out


def rows(run: Callable[[], Any], device: torch.device) -> tuple[list[Row], Any]:
    """Rows of one call, slowest first, and the profiler of the last call, whose trace can be exported.

    Times are medians over ``ROUNDS`` calls, so that other load on the machine does not point at the wrong kernel.
    """
    with torch.no_grad(), profiling.recording():
        run()
        with Counter() as counter:
            run()
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
        rounds = []
        for _ in range(ROUNDS):
            with profile(activities=activities, record_shapes=True) as profiler:
                run()
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
            rounds.append(_seconds(profiler, counter, device))
    found = {}
    for key, times in rounds[-1].items():
        row = Row(*key, calls=len(times), bytes=counter.bytes.get(key, 0), flops=counter.flops.get(key, 0))
        row.seconds = statistics.median(sum(r.get(key, [])) for r in rounds)
        found[key] = row
    return sorted(found.values(), key=lambda r: -r.seconds), profiler


@contextmanager
def named_layers(model: nn.Module) -> Iterator[None]:
    """Name the blocks of an eager model in the profile, by forward hooks."""
    handles: list[Any] = []
    open_ranges: list[Any] = []

    def enter(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            if profiling.enabled():
                open_ranges.append(profiling.range(name))
                open_ranges[-1].__enter__()

        return hook

    def leave(*_: Any) -> None:
        if open_ranges:
            open_ranges.pop().__exit__(None, None, None)

    for i, block in enumerate(model.blocks):  # type: ignore[arg-type]
        handles += [block.register_forward_pre_hook(enter(f"layer {i}")), block.register_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _seconds(profiler: Any, counter: Counter, device: torch.device) -> dict[Key, list[float]]:
    """Of every call of each kernel in one profile."""
    times: dict[Key, list[float]] = defaultdict(list)
    for key, event in _units(profiler.events(), counter):
        times[key].append((event.device_time_total if device.type == "cuda" else event.cpu_time_total) * 1e-6)
    return times


def _units(events: Sequence[Any], counter: Counter) -> Iterator[tuple[Key, Any]]:
    """The outermost events that are kernels: our ops, and operators that the counter saw."""
    names = {name for _, name in counter.bytes}
    for event in events:
        name = _name(event)
        if name not in names:
            continue
        parents, above = [], event.cpu_parent
        while above is not None:
            parents.append(above)
            above = above.cpu_parent
        if not any(_name(p) in names for p in parents):
            yield (_scale([p.name for p in reversed(parents)]), name), event


def _name(event: Any) -> str:
    return _kernel(event.name, [s for s in event.input_shapes or [] if s and isinstance(s[0], int)])


def _kernel(name: str, shapes: Sequence[Sequence[int]]) -> str:
    """The name of a kernel; of a matrix product with its sizes, rows x inputs x outputs."""
    if name in PRODUCTS:
        a, b = [s for s in shapes if len(s) == 2][:2]
        return f"{name.removeprefix('aten::')} {a[0]}x{a[1]}x{b[1]}"
    if name == PACKED_LINEAR:
        (rows, inputs), weight = shapes[:2]
        return f"packed linear {rows}x{inputs}x{weight[0]}"
    return name


def _scale(path: Sequence[str]) -> str:
    return next((p.removeprefix("scale ") for p in path if p.startswith("scale ")), "-")


def _flops(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    name = func.overloadpacket.__name__
    if "attention" in name:  # torch's counter knows neither the CPU's kernel nor ours
        q, k = args[:2]
        batch_tokens_heads = q.numel() // q.shape[-1]
        keys = k.shape[1] if func.namespace == "msdd_fast" else k.shape[2]
        return 4 * batch_tokens_heads * keys * q.shape[-1]
    formula = flop_registry.get(func.overloadpacket)
    return int(formula(*args, **kwargs, out_val=out)) if formula else 0
