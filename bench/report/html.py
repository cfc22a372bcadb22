"""The report of a run as one HTML page: inline CSS and SVG, no network, light and dark, wide and narrow."""

from __future__ import annotations

import html
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from msdd_fast.bench.report import svg
from msdd_fast.bench.report.results import (
    PERCENTILES,
    device_of,
    measurements,
    metadata_lines,
    percentile,
    waterfall_notes,
)
from msdd_fast.bench.report.text import number

STYLE = """
:root { color-scheme: light dark; --bg: #fff; --fg: #1b1f24; --soft: #667; --line: #d8dce2; --card: #f6f7f9; }
@media (prefers-color-scheme: dark) {
  :root { --bg: #14171b; --fg: #e6e8eb; --soft: #9aa3ad; --line: #333a42; --card: #1c2026; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 900px; padding: 16px; background: var(--bg); color: var(--fg);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: .5rem 0; } h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; } h3 { font-size: 1rem; }
p.note, figcaption { color: var(--soft); font-size: .875rem; }
section > figure, article { margin: 0 0 1rem; padding: 12px; background: var(--card); border-radius: 8px; }
figure { margin: 0; } p { overflow-wrap: anywhere; }
svg { width: 100%; max-width: 640px; height: auto; display: block; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .875rem; white-space: nowrap; width: 100%; }
th, td { text-align: right; padding: 4px 8px; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; }
text { fill: var(--fg); font: 11px system-ui, sans-serif; } text.value { fill: var(--soft); font-size: 10px; }
.grid { stroke: var(--line); } .roof { fill: none; stroke: var(--soft); stroke-dasharray: 5 4; }
.line { fill: none !important; stroke-width: 2; }
@media (max-width: 560px) { text { font-size: 14px; } text.value { font-size: 13px; } }
.legend span { margin-right: 1rem; display: inline-block; }
.legend i { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin-right: .35em; }
""" + "".join(
    f".s{i} {{ fill: {c}; background: {c}; stroke: none; }} .line.s{i} {{ stroke: {c}; }}\n"
    for i, c in enumerate(("#8a94a3", "#5b8def", "#e0a030", "#2fa37c", "#c65bcf", "#d95f5f", "#4bb3c8", "#9a7b5f"))
)


def page(document: Mapping[str, Any], past: Sequence[Mapping[str, Any]] = ()) -> str:
    """The page of one run. ``past``: stored runs of the same device, oldest first; may include this one."""
    series = list(dict.fromkeys(p["provider"] for r in document["cases"] for p in r["providers"]))
    where = "".join(f"<p class=note>{html.escape(line)}</p>" for line in metadata_lines(document))
    parts = [
        ("Images per second", _throughput(document, series)),
        ("Latency", _latency(document, series)),
        ("Where the speed comes from", _waterfall(document, series)),
        ("Roofline", _roofline(document)),
        ("Cold start", _cold_start(document)),
        ("History", _history([*(d for d in past if d["time"] != document["time"]), document])),
    ]
    body = "".join(f"<section><h2>{title}</h2>{content}</section>" for title, content in parts if content)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>msdd-fast bench</title><style>{STYLE}</style></head><body>"
        f"<h1>msdd-fast bench</h1>{where}{body}</body></html>\n"
    )


def _throughput(document: Mapping[str, Any], series: Sequence[str]) -> str:
    parts = [svg.legend(series)]
    for result in document["cases"]:
        batch = result["case"]["batch"]
        groups: dict[str, dict[str, float]] = {}
        for p in result["providers"]:
            for scale, m in measurements(p):
                groups.setdefault(_scale(scale), {})[p["provider"]] = batch / m.median
        whole = _scale("whole")
        ordered = {**{k: v for k, v in groups.items() if k != whole}, whole: groups[whole]}
        headline_first = {whole: groups[whole], **ordered}  # in sight on a phone
        figure = f"<figure>{svg.bars(ordered, 'img/s', series)}</figure>{_table(headline_first, series)}"
        missing = "".join(f"<p class=note>{html.escape(f'{n}: {why}')}</p>" for n, why in result["missing"].items())
        parts.append(f"<article><h3>{html.escape(result['case']['name'])}</h3>{figure}{missing}</article>")
    return "".join(parts)


def _latency(document: Mapping[str, Any], series: Sequence[str]) -> str:
    """Percentiles of one call, where there are enough rounds."""
    parts = []
    for result in document["cases"]:
        groups: dict[str, dict[str, float]] = {f"p{q}": {} for q in PERCENTILES}
        for p in result["providers"]:
            for q in PERCENTILES:
                value = percentile(p["samples"], q)
                if value is not None:
                    groups[f"p{q}"][p["provider"]] = value * 1e3
        groups = {k: v for k, v in groups.items() if v}
        counts = [len(p["samples"]) for p in result["providers"]]
        rounds = " to ".join(str(n) for n in dict.fromkeys((min(counts), max(counts))))
        parts.append(
            f"<article><h3>{html.escape(result['case']['name'])}, ms</h3>{svg.bars(groups, 'ms', series)}"
            f"<p class=note>{rounds} rounds; p95 needs 20, p99 100.</p></article>"
        )
    return svg.legend(series) + "".join(parts)


def _waterfall(document: Mapping[str, Any], series: Sequence[str]) -> str:
    waterfall = document.get("waterfall")
    if not waterfall:
        return ""
    colours = list(dict.fromkeys([*series, "engine-exact"]))
    plain = colours[0]

    def colour(name: str) -> str:
        """Its own where it has one; the exact tier's for each step towards it."""
        return name if name in colours else plain if name.startswith(("compile", "bare")) else "engine-exact"

    parts = []
    for result in waterfall["results"]:
        bars = {r["provider"]: {colour(r["provider"]): r["images_per_second"]} for r in result["rows"]}
        name = html.escape(f"{waterfall['model']} decode, batch {result['batch']}, img/s")
        notes = "".join(f"<p class=note>{html.escape(line)}</p>" for line in waterfall_notes(result))
        parts.append(f"<article><h3>{name}</h3>{svg.bars(bars, 'img/s', colours)}{notes}</article>")
    note = (
        "<p class=note>Each bar has everything above it, up to the exact tier. Beside it: the fast tier, "
        "torch.compile, and the bare matrix products.</p>"
    )
    return note + "".join(parts)


def _roofline(document: Mapping[str, Any]) -> str:
    points: dict[str, list[tuple[float, float, str]]] = {}
    for result in document["cases"]:
        for p in result["providers"]:
            for scale, m in measurements(p):
                work = result["work"][scale]
                what = f"{result['case']['name']}, {_scale(scale)}"
                points.setdefault(p["provider"], []).append(
                    (work["flops"] / work["bytes"], work["flops"] / m.median / 1e9, what)
                )
    copy = document["ceilings"]["copy"] / 1e9
    roofs = [(f"{n} GEMM", copy, rate / 1e9) for n, rate in document["ceilings"].items() if n != "copy"]
    chart = svg.scatter(points, roofs, ("FLOP per byte", "GFLOP/s"))
    note = (
        "FLOP and bytes by formula, as the engine runs the decode in two-byte elements; ceilings measured in this run. "
        "A point above a roof had its data in a cache, or multiplied 8-bit numbers."
    )
    return f"{svg.legend(list(points))}<figure>{chart}<figcaption>{note}</figcaption></figure>"


def _cold_start(document: Mapping[str, Any]) -> str:
    if not document["cold_start"]:
        return ""
    bars = {step: {"s": seconds} for step, seconds in document["cold_start"].items()}
    note = "msdd-nano, batch 1, seconds, in a fresh process"
    return f"<figure>{svg.bars(bars, 's', ['s'])}<figcaption>{note}</figcaption></figure>"


def _history(documents: Sequence[Mapping[str, Any]]) -> str:
    """The fastest provider of every case over the runs of one device, against the first of them.

    Relative, since a small model is a hundred times as fast as a large one.
    """
    mine = [d for d in documents if device_of(d) == device_of(documents[-1])]
    series: dict[str, list[tuple[int, float]]] = {}
    for i, d in enumerate(mine):
        for result in d["cases"]:
            best = min(result["providers"], key=lambda p: statistics.median(p["samples"]))
            speed = result["case"]["batch"] / statistics.median(best["samples"])
            series.setdefault(result["case"]["name"], []).append((i, speed))
    ticks = [d["time"][:10] for d in mine]
    relative = {name: [(i, v / values[0][1]) for i, v in values] for name, values in series.items()}
    chart = svg.lines(relative, ticks, "times the first run")
    note = (
        f"{len(mine)} run(s) of {device_of(documents[-1])}: fastest provider against its first run; latest img/s above."
    )
    names = [f"{name}: {number(values[-1][1])} img/s" for name, values in series.items()]
    return f"{svg.legend(names)}<figure>{chart}<figcaption>{html.escape(note)}</figcaption></figure>"


def _table(groups: Mapping[str, Mapping[str, float]], series: Sequence[str]) -> str:
    used = [s for s in series if any(s in g for g in groups.values())]
    head = "".join(f"<th>{html.escape(name)}" for name in ("", *groups))
    rows = "".join(
        f"<tr><td>{html.escape(s)}" + "".join(f"<td>{number(g[s]) if s in g else '-'}" for g in groups.values())
        for s in used
    )
    return f'<div class="scroll"><table><tr>{head}{rows}</table></div>'


def _scale(scale: str) -> str:
    return f"{scale} px" if scale != "whole" else "whole"
