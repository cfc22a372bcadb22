"""Tables and numbers as text, for all benchmarks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

COLUMNS = 80
"""Width of a terminal. Wider tables have one space between columns instead of two."""


def aligned(rows: Sequence[Sequence[str]], left: Iterable[int] = (0,)) -> list[str]:
    """Lines of a table for a terminal: columns in ``left`` are aligned to the left, the others to the right."""
    widths = [max(len(r[c]) for r in rows) for c in range(len(rows[0]))]
    gap = "  " if sum(widths) + 2 * (len(widths) - 1) <= COLUMNS else " "
    to_left = set(left)
    return [
        gap.join(
            cell.ljust(w) if c in to_left else cell.rjust(w) for c, (cell, w) in enumerate(zip(r, widths, strict=True))
        ).rstrip()
        for r in rows
    ]


def markdown_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table; the first row is the header."""
    header, *body = rows
    return ["| " + " | ".join(header) + " |", "|" + "---|" * len(header), *("| " + " | ".join(r) + " |" for r in body)]


def number(x: float) -> str:
    """Three digits."""
    return f"{x:.0f}" if x >= 100 else f"{x:.1f}" if x >= 10 else f"{x:.2f}" if x >= 1 else f"{x:.3f}"


def error_text(error: float | None) -> str:
    """ "1e-06"; "-" where results could not be compared."""
    return "-" if error is None else f"{error:.0e}"


def ceilings_line(ceilings: Mapping[str, float]) -> str:
    """ "copy 12.3 GB/s, float32 GEMM 0.10 TFLOP/s"."""
    parts = [
        f"{name} {rate / 1e9:.1f} GB/s" if name == "copy" else f"{name} GEMM {rate / 1e12:.3g} TFLOP/s"
        for name, rate in ceilings.items()
    ]
    return ", ".join(parts)
