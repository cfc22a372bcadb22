"""Peak memory of one call."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def memory(run: Callable[[], Any], device: torch.device, path: Path | None) -> str:
    """Text: the peak of the memory that one call allocates.

    On a GPU a snapshot for pytorch.org/memory_viz is written to ``path``.
    """
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
    return f"peak {peak / 2**20:.1f} MiB above the start of the call ({len(changes)} allocations and releases)"
