"""Documents of ``msdd-fast bench``: storing, reading, telling which device they are from, and their tables."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from msdd_fast.bench.report.documents import read_json
from msdd_fast.bench.report.text import aligned, ceilings_line, error_text, number
from msdd_fast.bench.timing.harness import Measurement
from msdd_fast.errors import InputError
from msdd_fast.io.files import atomic_write

FORMAT = "msdd-fast bench 1"
FAST = "engine-fast"
PERCENTILES = (50, 95, 99)
RESULTS = Path(__file__).resolve().parents[1] / "results"


def save(document: Mapping[str, Any], path: str | Path) -> None:
    """Store a run as JSON, one line per provider."""
    text = json.dumps(document, separators=(",", ":")).replace('{"provider"', '\n{"provider"')
    with atomic_write(path) as temporary:
        temporary.write_text(text + "\n")


def read(path: str | Path) -> dict[str, Any]:
    """A stored run. Raises InputError for a file that is missing or is something else."""
    document = read_json(path, "a JSON file of msdd-fast bench")
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise InputError(f"{path} must be a JSON file of msdd-fast bench, format {FORMAT!r}")
    return document


def device_of(document: Mapping[str, Any]) -> str:
    """The device whose numbers are comparable: the GPU, or the CPU with its number of threads."""
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
    """None if there are too few samples for one of them to lie beyond it."""
    if percent > 50 and len(samples) < round(100 / (100 - percent)):
        return None
    return Measurement("", tuple(samples), None).quantile(percent / 100)


def case_lines(result: Mapping[str, Any]) -> list[str]:
    """The tables of one case: img/s for each scale and the whole, and the latency of the whole in ms."""
    batch, providers = result["case"]["batch"], result["providers"]
    scales = list(providers[0].get("scales", {}))
    base = statistics.median(providers[0]["samples"])
    speeds = [["img/s", *(f"{s} px" for s in scales), "decode" if scales else "encode", "x", "error"]]
    latencies = [["ms", *(f"p{p}" for p in PERCENTILES), "rounds", "first call"]]
    for p in providers:
        medians = {name: m.median for name, m in measurements(p)}
        speeds.append(
            [
                p["provider"],
                *(number(batch / medians[s]) for s in [*scales, "whole"]),
                f"{base / medians['whole']:.2f}",
                error_text(p["max_error"]),
            ]
        )
        times = [percentile(p["samples"], q) for q in PERCENTILES]
        latencies.append(
            [
                p["provider"],
                *("-" if x is None else number(x * 1e3) for x in times),
                str(len(p["samples"])),
                number(p["first_call_s"] * 1e3),
            ]
        )
    missing = [f"  {name}: {reason}" for name, reason in result["missing"].items()]
    return [result["case"]["name"], *aligned(speeds), *aligned(latencies), *missing]


def metadata_lines(document: Mapping[str, Any]) -> list[str]:
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


def waterfall_notes(result: Mapping[str, Any]) -> list[str]:
    """The fast tier's expected loss, and the reasons why bars are missing."""
    losses = [r["expected_psnr_loss"] for r in result["rows"] if "expected_psnr_loss" in r]
    notes = [f"{FAST} is not exact: int8 or float8 products, expected to cost {loss:.3f} dB of PSNR" for loss in losses]
    return notes + [f"{name}: {why}" for name, why in result.get("missing", {}).items()]
