"""Where the time of a decode goes: per scale and kernel, with bytes, FLOP and the fraction of the measured roofline.

Two passes over the same work: ``torch.profiler`` times it, and a dispatch mode counts what every operator touches and
multiplies. They meet by scale and name. Graphs are left out, since a replayed graph has no operators.
"""

from __future__ import annotations

import importlib
import inspect
import json
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from msdd_fast import profiling
from msdd_fast.bench.ops import suite
from msdd_fast.bench.report.results import aligned, number
from msdd_fast.bench.report.text import ceilings_line
from msdd_fast.bench.timing.ceilings import copy_bandwidth, floor_seconds, gemm_rate
from msdd_fast.bench.timing.trace import NO_KERNEL, PACKED_LINEAR, touched_bytes
from msdd_fast.errors import InputError

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

    Times are medians over ``ROUNDS`` calls: a neighbour on the machine should not point at the wrong kernel.
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


def table(found: Sequence[Row], device: torch.device, dtype: torch.dtype, top: int) -> list[str]:
    """The slowest rows, and one for each scale."""
    whole = sum(r.seconds for r in found)
    lines = [["kernel", "scale", "calls", "ms", "%", "MB", "GFLOP", "GB/s", "GFLOP/s", "% of roofline"]]
    lines += [_cells(r, whole, device, dtype) for r in found[:top]]
    scales: dict[str, Row] = {}
    for r in found:
        s = scales.setdefault(r.scale, Row(r.scale, "all"))
        s.calls, s.seconds = s.calls + r.calls, s.seconds + r.seconds
        s.bytes, s.flops = s.bytes + r.bytes, s.flops + r.flops
    lines += [_cells(s, whole, device, dtype) for s in sorted(scales.values(), key=lambda s: s.scale.rjust(6))]
    rest = [f"... {len(found) - top} more kernels"] if len(found) > top else []
    ceilings = {"copy": copy_bandwidth(device), str(dtype).removeprefix("torch."): gemm_rate(device, dtype)}
    return [f"ceilings of this run: {ceilings_line(ceilings)}", *aligned(lines), *rest]


@contextmanager
def named_layers(model: nn.Module) -> Iterator[None]:
    """Ranges around the blocks of an eager model, by hooks: its code knows nothing of them."""
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


def one_op(name: str, case: suite.Case, backend: str | None) -> Callable[[], Any]:
    """A call of one op with the inputs that its benchmark makes. Raises InputError for an unknown op."""
    from msdd_fast import ops

    if name not in ops.__all__:
        raise InputError(f"--op must be one of {', '.join(ops.__all__)}, got {name!r}")
    module = importlib.import_module(f"msdd_fast.bench.test_{name}")
    calls: list[Callable[[], Any]] = []

    def capture(op: Callable[..., Any], inputs: Sequence[Any], *_: Any, **__: Any) -> None:
        calls.append(lambda: op(*inputs, backend=backend))

    torch.manual_seed(0)
    for test_name, test in vars(module).items():
        if test_name.startswith("test_") and list(inspect.signature(test).parameters) == ["case", "measure"]:
            test(case, capture)
    return calls[0]


def parse_shape(text: str) -> tuple[int, int]:
    """ "8x256": a batch of 8 at 256 px. Raises InputError."""
    batch, _, scale = text.partition("x")
    if not (batch.isdigit() and scale.isdigit() and int(batch) and int(scale)):
        raise InputError(f"--shape must be BATCHxPIXELS, such as 8x256, got {text!r}")
    return int(batch), int(scale)


def memory(run: Callable[[], Any], device: torch.device, path: Path | None) -> str:
    """Peak of the memory that one call allocates; on a GPU a snapshot for pytorch.org/memory_viz goes to ``path``."""
    run()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        torch.cuda.memory._record_memory_history()
        before = torch.cuda.memory_allocated(device)
        run()
        if path is not None:
            torch.cuda.memory._dump_snapshot(str(path))
        torch.cuda.memory._record_memory_history(enabled=None)
        peak = torch.cuda.max_memory_allocated(device) - before
        return f"peak {peak / 2**20:.1f} MiB above {before / 2**20:.1f} MiB"
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler, torch.no_grad():
        run()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e["name"] == "[memory]")
    now = peak = 0
    for _, change in changes:
        now += change
        peak = max(peak, now)
    return f"peak {peak / 2**20:.1f} MiB above what was there before the call ({len(changes)} allocations and releases)"


def _seconds(profiler: Any, counter: Counter, device: torch.device) -> dict[Key, list[float]]:
    """Of every call of each kernel in one profile."""
    times: dict[Key, list[float]] = defaultdict(list)
    for key, event in _units(profiler.events(), counter):
        times[key].append((event.device_time_total if device.type == "cuda" else event.cpu_time_total) * 1e-6)
    return times


def _units(events: Sequence[Any], counter: Counter) -> Iterator[tuple[Key, Any]]:
    """The outermost events that are kernels: our ops, and operators that the counter has seen."""
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
    """Matrix products are told apart by their sizes: rows x inputs x outputs."""
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
    if "attention" in name:  # the counter of torch does not know the CPU's kernel, nor ours
        q, k = args[:2]
        batch_tokens_heads = q.numel() // q.shape[-1]
        keys = k.shape[1] if func.namespace == "msdd_fast" else k.shape[2]
        return 4 * batch_tokens_heads * keys * q.shape[-1]
    formula = flop_registry.get(func.overloadpacket)
    return int(formula(*args, **kwargs, out_val=out)) if formula else 0


def _cells(r: Row, whole: float, device: torch.device, dtype: torch.dtype) -> list[str]:
    known = r.bytes > 0 and r.seconds > 0
    return [
        r.kernel,
        r.scale,
        str(r.calls),
        f"{r.seconds * 1e3:.3f}",
        f"{100 * r.seconds / whole:.1f}",
        f"{r.bytes / 1e6:.1f}",
        f"{r.flops / 1e9:.3f}",
        number(r.bytes / r.seconds / 1e9) if known else "-",
        number(r.flops / r.seconds / 1e9) if known and r.flops else "-",
        f"{100 * floor_seconds(device, dtype, r.bytes, r.flops) / r.seconds:.0f}" if known else "-",
    ]
