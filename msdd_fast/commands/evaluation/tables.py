"""Tables of reports, in the forms of the MSDD paper's three tables."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from msdd_fast.bench.report.text import aligned, markdown_table

Row = Mapping[str, Any]


class Column(NamedTuple):
    """``value`` of a report, None if it has none, shown in ``format``."""

    title: str
    value: Callable[[Row], Any]
    format: str = ""


def _figure(name: str) -> Callable[[Row], Any]:
    return lambda row: row.get("mean", {}).get(name)


def _ours(name: str) -> Callable[[Row], Any]:
    return lambda row: row.get("throughput", {}).get("ours", {}).get(name)


def _authors(row: Row) -> Any:
    measured = row.get("throughput", {}).get("authors", {}).get("encode_decode_images_per_second")
    return row.get("authors") if measured is None else measured


def tokens(row: Row) -> int | None:
    """Latent tokens of an image: N of (N, D), the pixels of (C, H, W)."""
    shape = row.get("latent_shape")
    if not shape:
        return None
    return int(shape[0]) if len(shape) == 2 else math.prod(shape[1:])


NAME = Column("model", lambda row: row.get("name"))
SET = Column("set", lambda row: None if "source" in row else f"{row.get('set')}, {row.get('count')}")
TOKENS = Column("tokens", tokens, "g")
SIZE = Column("px", lambda row: row.get("image_size"), "g")
SCALES = Column("scales", lambda row: row.get("scales"), "g")
STEPS = Column("steps per scale", lambda row: row.get("steps_per_scale"), "g")
CFG = Column("CFG", lambda row: row.get("cfg_scale"), "g")

FORMS: dict[int, tuple[Column, ...]] = {
    1: (NAME, SET, SIZE, TOKENS),
    2: (NAME, SET, SCALES, STEPS),
    3: (NAME, SET, SCALES, STEPS, CFG),
}
"""What stands in front of the figures: tokenizers compared; steps and scales; what a model was made or run with."""

# These are in every table; the others in those that have a value for them.
ALWAYS = (
    Column("rFID", _figure("fid"), ".2f"),
    Column("PSNR (dB)", _figure("psnr_db"), ".2f"),
    Column("SSIM", _figure("ssim"), ".3f"),
)
IF_MEASURED = (
    Column("SSIM, data range 2", _figure("ssim_authors"), ".3f"),
    Column("LPIPS (VGG)", _figure("lpips_vgg"), ".3f"),
    Column("LPIPS (Alex)", _figure("lpips_alex"), ".3f"),
    Column("VGG-19 distance", _figure("vgg19_distance"), ".3f"),
    Column("KID", _figure("kid"), ".4g"),
    Column("Frechet (VGG-19)", _figure("frechet_vgg19"), ".1f"),
    Column("KID (VGG-19)", _figure("kid_vgg19"), ".4g"),
    Column("Frechet (SqueezeNet)", _figure("frechet_squeezenet"), ".1f"),
    Column("KID (SqueezeNet)", _figure("kid_squeezenet"), ".4g"),
    Column("img/s, decode", _ours("decode_images_per_second"), ".4g"),
    Column("img/s, encode + decode", _ours("encode_decode_images_per_second"), ".4g"),
    Column("img/s, authors' way", _authors, ".4g"),
)
CONDITIONS = (
    *("mode", "split", "crop", "pixels", "checkpoint", "decoder", "dtype", "computed_in"),
    *("batch_size", "seed", "unreadable", "device"),
)


def cells(form: int, rows: Sequence[Row]) -> list[list[str]]:
    """Header and rows as text. A published row, which has a source, is marked as such."""
    shown = [c for c in IF_MEASURED if any(c.value(row) is not None for row in rows)]
    columns = (*FORMS[form], *ALWAYS, *shown)
    table = [[c.title for c in columns]]
    for row in rows:
        line = ["-" if (v := c.value(row)) is None else _one_line(format(v, c.format)) for c in columns]
        if "source" in row:
            line[0] += " (published)"
        table.append(line)
    return table


def notes(rows: Sequence[Row]) -> list[str]:
    """The conditions of our rows, and where the published ones are from."""
    found: dict[str, list[str]] = {}
    for row in rows:
        if "source" in row:
            text = f"published: {row['source']}"
        else:
            conditions = (*CONDITIONS, "threads") if row.get("throughput") else CONDITIONS
            text = "; ".join(f"{k} {row[k]}" for k in conditions if row.get(k) is not None and (row[k] or k == "seed"))
        found.setdefault(" ".join(text.split()), []).append(_one_line(row.get("name")))
    return [f"{', '.join(dict.fromkeys(names))}: {text}" for text, names in found.items()]


def _one_line(value: object) -> str:
    return " ".join(str(value).split())


def text(form: int, rows: Sequence[Row]) -> str:
    return "\n".join([*aligned(cells(form, rows), left=(0, 1)), "", *notes(rows)]) + "\n"


def markdown(form: int, rows: Sequence[Row]) -> str:
    escaped = [[cell.replace("|", "\\|") for cell in line] for line in cells(form, rows)]
    return "\n".join([*markdown_table(escaped), "", *(f"- {note}" for note in notes(rows))]) + "\n"


def latex(form: int, rows: Sequence[Row]) -> str:
    """A tabular of the package booktabs; the notes are comments."""
    header, *body = ([escape(cell) for cell in line] for line in cells(form, rows))
    lines = [f"% {note}" for note in notes(rows)]
    lines += [
        rf"\begin{{tabular}}{{ll{'r' * (len(header) - 2)}}}",
        r"\toprule",
        rf"{' & '.join(header)} \\",
        r"\midrule",
    ]
    lines += [rf"{' & '.join(line)} \\" for line in body]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def escape(cell: str) -> str:
    r"""For LaTeX. "-" becomes a dash."""
    if cell == "-":
        return "--"
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    special |= {c: f"\\{c}" for c in "&%$#_{}"}
    return "".join(special.get(c, c) for c in cell)


FORMATS: dict[str, Callable[[int, Sequence[Row]], str]] = {"text": text, "markdown": markdown, "latex": latex}
