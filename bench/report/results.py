"""Documents of ``msdd-fast bench``: reading, whose device they are from, and their tables."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from msdd_fast.bench.decode.suite import FORMAT
from msdd_fast.bench.report.text import ceilings_line
from msdd_fast.bench.timing.harness import Measurement
from msdd_fast.errors import InputError
from msdd_fast.io.files import atomic_write

PERCENTILES = (50, 95, 99)
RESULTS = Path(__file__).resolve().parents[1] / "results"


def save(document: Mapping[str, Any], path: str | Path) -> None:
    """JSON with short lines of samples."""
    with atomic_write(Path(path)) as temporary:
        temporary.write_text(json.dumps(document, separators=(",", ":")).replace('{"provider"', '\n{"provider"') + "\n")


def read(path: str | Path) -> dict[str, Any]:
    """A stored run. Raises InputError for a file that is missing or is something else."""
    try:
        document = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path} must be a JSON file of msdd-fast bench: {error}") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise InputError(f"{path} must be a JSON file of msdd-fast bench, format {FORMAT!r}")
    return document


def device_of(document: Mapping[str, Any]) -> str:
    """What a number must be measured on to be compared: the GPU, or the CPU with its threads."""
    machine = document["machine"]
    if document["device"] == "cuda":
        return str(machine["gpu"]["name"])
    threads = machine["torch_threads"]
    return f"{machine['cpu']['model']}, {machine['cpu']['capability']}, {threads} thread{'s' * (threads > 1)}"


def slug(document: Mapping[str, Any]) -> str:
    """The device as a folder name."""
    letters = "".join(c if c.isalnum() else "-" for c in device_of(document).lower())
    return "-".join(part for part in letters.split("-") if part)


def history(document: Mapping[str, Any], folder: Path = RESULTS) -> list[dict[str, Any]]:
    """The committed runs of the same device, oldest first."""
    documents = []
    for path in sorted((folder / slug(document)).glob("*.json")):
        try:
            documents.append(read(path))
        except InputError:
            continue  # another kind of result
    return sorted(documents, key=lambda d: d["time"])


def measurements(provider: Mapping[str, Any]) -> Iterator[tuple[str, Measurement]]:
    """("whole" or pixels, samples) of one provider of a case."""
    yield "whole", Measurement(provider["provider"], tuple(provider["samples"]), provider["max_error"])
    for scale, samples in provider.get("scales", {}).items():
        yield scale, Measurement(provider["provider"], tuple(samples), None)


def percentile(samples: Sequence[float], percent: int) -> float | None:
    """None where there are too few samples to have seen one beyond it."""
    if percent > 50 and len(samples) < round(100 / (100 - percent)):
        return None
    return Measurement("", tuple(samples), None).quantile(percent / 100)


def case_lines(result: Mapping[str, Any]) -> list[str]:
    """The table of one case: img/s for each scale and the whole, and latencies of the whole in ms."""
    batch, providers = result["case"]["batch"], result["providers"]
    scales = list(providers[0].get("scales", {}))
    whole = "decode" if scales else "encode"
    header = [
        "",
        *(f"{s} px" for s in scales),
        whole,
        "x",
        *(f"p{p} ms" for p in PERCENTILES),
        "rounds",
        "first s",
        "error",
    ]
    rows = [header]
    base = statistics.median(providers[0]["samples"])
    for p in providers:
        medians = {name: m.median for name, m in measurements(p)}
        latencies = [percentile(p["samples"], q) for q in PERCENTILES]
        rows.append(
            [
                p["provider"],
                *(number(batch / medians[s]) for s in scales),
                number(batch / medians["whole"]),
                f"{base / medians['whole']:.2f}",
                *("-" if x is None else number(x * 1e3) for x in latencies),
                str(len(p["samples"])),
                number(p["first_call_s"]),
                "-" if p["max_error"] is None else f"{p['max_error']:.0e}",
            ]
        )
    title = f"{result['case']['name']}: img/s"
    return [title, *aligned(rows), *(f"  {name}: {reason}" for name, reason in result["missing"].items())]


def facts_lines(document: Mapping[str, Any]) -> list[str]:
    """Device, versions, ceilings and cold start."""
    machine = document["machine"]
    commit, _, changes = (machine["commit"] or "unknown").partition("+")
    commit = commit[:10] + ("+" + changes if changes else "")
    lines = [
        f"{device_of(document)}; torch {machine['packages']['torch']}; commit {commit}; {document['time']}",
        f"ceilings of this run: {ceilings_line(document['ceilings'])}",
    ]
    if document["cold_start"]:
        steps = ", ".join(f"{step} {seconds:.2f} s" for step, seconds in document["cold_start"].items())
        lines.append(f"cold start of msdd-nano: {steps}")
    return lines


def number(x: float) -> str:
    """Three digits."""
    return f"{x:.0f}" if x >= 100 else f"{x:.1f}" if x >= 10 else f"{x:.2f}" if x >= 1 else f"{x:.3f}"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns: the first to the left, the others to the right."""
    widths = [max(len(r[c]) for r in rows) for c in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(w) if c == 0 else cell.rjust(w) for c, (cell, w) in enumerate(zip(r, widths, strict=True)))
        for r in rows
    ]
