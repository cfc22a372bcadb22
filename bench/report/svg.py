"""Small charts as inline SVG: bars, points and lines. Colours are CSS classes (s0, s1, ...), which themes define."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence

WIDTH = 480
LEFT, RIGHT, TOP, BOTTOM = 96, 48, 8, 34
BAR = 16
LETTER = 7.8  # of the labels, at the size that they have on a phone
SERIES = 8


def bars(groups: Mapping[str, Mapping[str, float]], unit: str, series: Sequence[str], log: bool = False) -> str:
    """Horizontal bars, group by group; a bar's colour follows from its place in ``series``."""
    values = [v for g in groups.values() for v in g.values() if v > 0]
    if not values:
        return ""
    low = 10 ** math.floor(math.log10(min(values))) if log else 0.0
    high = max(values)
    left = max(48, 12 + LETTER * max(map(len, groups)))
    room = WIDTH - left - RIGHT

    def length(v: float) -> float:
        if v <= 0:
            return 0.0
        return room * (math.log(v / low) / math.log(high / low) if log and high > low else v / high)

    body, y = [], TOP
    for group, entries in groups.items():
        body.append(_text(left - 8, y + BAR * len(entries) / 2 + 3, group, "end"))
        for name, value in entries.items():
            title = html.escape(f"{group}, {name}: {short(value)} {unit}")
            body.append(
                f'<rect class="s{series.index(name) % SERIES}" x="{left:.0f}" y="{y}" rx="2" height="{BAR - 3}" '
                f'width="{max(length(value), 1):.1f}"><title>{title}</title></rect>'
            )
            body.append(_text(left + max(length(value), 1) + 5, y + BAR - 5, short(value), "start", "value"))
            y += BAR
        y += 9
    return _svg(y, body, f"bars, {unit}{', logarithmic' if log else ''}")


def legend(series: Sequence[str]) -> str:
    items = (f'<span><i class="s{i % SERIES}"></i>{html.escape(s)}</span>' for i, s in enumerate(series))
    return f'<p class="legend">{"".join(items)}</p>'


def scatter(
    points: Mapping[str, Sequence[tuple[float, float, str]]],
    roofs: Sequence[tuple[str, float, float]],
    labels: tuple[str, str],
) -> str:
    """Logarithmic plot of (x, y, what) with rooflines (name, bandwidth, peak): y = min(peak, bandwidth * x)."""
    flat = [p for ps in points.values() for p in ps]
    if not flat:
        return ""
    ridges = [peak / bandwidth for _, bandwidth, peak in roofs]
    x0, x1 = _decades([p[0] for p in flat] + ridges)
    y0, y1 = _decades([p[1] for p in flat] + [peak for *_, peak in roofs])
    height = 320

    def at(x: float, y: float) -> tuple[float, float]:
        right = WIDTH - 20
        return (
            LEFT + (right - LEFT) * math.log(x / x0) / math.log(x1 / x0),
            height - BOTTOM - (height - BOTTOM - TOP) * math.log(y / y0) / math.log(y1 / y0),
        )

    body = _grid(at, (x0, x1), (y0, y1), height)
    for name, bandwidth, peak in roofs:
        start = max(x0, y0 / bandwidth)
        corners = [at(start, bandwidth * start), at(peak / bandwidth, peak), at(x1, peak)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in corners)
        body.append(f'<polyline class="roof" points="{path}"/>')
        body.append(_text(corners[1][0] + 8, corners[1][1] - 5, name, "start", "value"))  # few points lie at the ridge
    for i, (name, ps) in enumerate(points.items()):
        for x, y, what in ps:
            cx, cy = at(x, y)
            body.append(
                f'<circle class="s{i % SERIES}" cx="{cx:.1f}" cy="{cy:.1f}" r="5">'
                f"<title>{html.escape(f'{name}, {what}: {short(y)} {labels[1]}')}</title></circle>"
            )
    body.append(_text((LEFT + WIDTH) / 2, height - 4, labels[0], "middle"))
    body.append(_text(LEFT - 8, TOP + 28, labels[1], "end"))
    return _svg(height, body, f"{labels[1]} over {labels[0]}")


def lines(series: Mapping[str, Sequence[tuple[int, float]]], ticks: Sequence[str], unit: str) -> str:
    """One line per name over the positions of ``ticks``; the y axis starts at zero."""
    flat = [v for vs in series.values() for _, v in vs]
    if not flat:
        return ""
    height, high = 200, max(flat) * 1.05
    step = (WIDTH - 40 - LEFT) / max(len(ticks) - 1, 1)

    def at(i: int, v: float) -> tuple[float, float]:
        return LEFT + 10 + step * i, height - BOTTOM - (height - BOTTOM - TOP) * v / high

    body = []
    for fraction in (0.0, 0.5, 1.0):
        y = at(0, fraction * high)[1]
        body.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - 20}" y1="{y:.1f}" y2="{y:.1f}"/>')
        body.append(_text(LEFT - 8, y + 4, short(fraction * high), "end", "value"))
    for k, (name, values) in enumerate(series.items()):
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(i, v) for i, v in values))
        body.append(f'<polyline class="line s{k % SERIES}" points="{path}"/>')
        for i, v in values:
            x, y = at(i, v)
            title = html.escape(f"{name}, {ticks[i]}: {short(v)} {unit}")
            body.append(
                f'<circle class="s{k % SERIES}" cx="{x:.1f}" cy="{y:.1f}" r="4"><title>{title}</title></circle>'
            )
    last = len(ticks) - 1
    middle = {last // 2: "middle"} if last > 1 and last % 2 == 0 else {}
    for i, anchor in {**middle, last: "end", 0: "start"}.items():
        body.append(_text(at(i, 0)[0], height - 12, ticks[i], anchor, "value"))
    return _svg(height, body, f"{unit} over runs")


def short(x: float) -> str:
    """Three digits with k, M, G for thousands."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(x) >= size:
            return f"{x / (1e3 if letter == 'k' else size):.3g}{letter}"
    return f"{x:.0f}" if abs(x) >= 100 else f"{x:.3g}"


def _decades(values: Sequence[float]) -> tuple[float, float]:
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values) * 1.001))
    return 10.0**low, 10.0 ** max(high, low + 1)


def _grid(at, x_range: tuple[float, float], y_range: tuple[float, float], height: int) -> list[str]:  # type: ignore[no-untyped-def]
    body = []
    for exponent in range(round(math.log10(x_range[0])), round(math.log10(x_range[1])) + 1):
        x, _ = at(10.0**exponent, y_range[0])
        body.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{height - BOTTOM}"/>')
        body.append(_text(x, height - BOTTOM + 15, short(10.0**exponent), "middle", "value"))
    for exponent in range(round(math.log10(y_range[0])), round(math.log10(y_range[1])) + 1):
        _, y = at(x_range[0], 10.0**exponent)
        body.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - 20}" y1="{y:.1f}" y2="{y:.1f}"/>')
        body.append(_text(LEFT - 8, y + 4, short(10.0**exponent), "end", "value"))
    return body


def _text(x: float, y: float, text: str, anchor: str, kind: str = "label") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(text)}</text>'


def _svg(height: float, body: Sequence[str], label: str) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{html.escape(label)}">{"".join(body)}</svg>'
