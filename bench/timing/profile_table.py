"""The table of a profile: kernels and scales by time, with the fraction of the roofline measured in the same run."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from msdd_fast.bench.report.text import aligned, ceilings_line, number
from msdd_fast.bench.timing.ceilings import copy_bandwidth, floor_seconds, gemm_rate
from msdd_fast.bench.timing.profile import Row


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
