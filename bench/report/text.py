"""The table of a run, from the extra_info of its benchmarks.

python -m msdd_fast.bench.report.text FILE.json [...]     (prints Markdown)
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

HEADER = ("op", "px", "dtype", "batch", "provider", "median us", "GB/s", "% of copy", "speed-up", "img/s", "max error")


def cells(info: Mapping[str, Any]) -> tuple[str, ...]:
    """One row; speed-up is against the first baseline of the same case."""
    error = info["max_error"]
    return (
        info["op"],
        str(info["scale"]),
        info["dtype"],
        str(info["batch"]),
        info["backend"],
        f"{info['median_us']:.1f}",
        f"{info['gigabytes_per_second']:.2f}",
        f"{100 * info['fraction_of_copy']:.0f}",
        f"{info['speedup']:.2f}",
        f"{info['images_per_second']:.0f}",
        "-" if error is None else f"{error:.1e}",
    )


def text_table(infos: Iterable[Mapping[str, Any]]) -> list[str]:
    """Aligned lines for a terminal."""
    rows = [HEADER, *(cells(i) for i in infos)]
    left = (True, False, True, False, True) + (False,) * (len(HEADER) - 5)
    widths = [max(len(r[c]) for r in rows) for c in range(len(HEADER))]
    return [
        "  ".join(cell.ljust(w) if is_left else cell.rjust(w) for cell, w, is_left in zip(r, widths, left, strict=True))
        for r in rows
    ]


def markdown_table(infos: Iterable[Mapping[str, Any]]) -> list[str]:
    rows: Sequence[Sequence[str]] = [HEADER, ["---"] * len(HEADER), *(cells(i) for i in infos)]
    return ["| " + " | ".join(r) + " |" for r in rows]


def ceilings_line(ceilings: Mapping[str, float]) -> str:
    """ "copy 12.3 GB/s, float32 GEMM 0.10 TFLOP/s"."""
    parts = [
        f"{name} {rate / 1e9:.1f} GB/s" if name == "copy" else f"{name} GEMM {rate / 1e12:.3g} TFLOP/s"
        for name, rate in ceilings.items()
    ]
    return ", ".join(parts)


def markdown(document: Mapping[str, Any]) -> str:
    """Machine, ceilings and table of one JSON file of pytest-benchmark."""
    machine = document["machine_info"]["msdd_fast"]
    gpu, cpu = machine["gpu"], machine["cpu"]
    device = f"{gpu['name']}, driver {gpu.get('driver_version')}" if gpu else f"{cpu['model']}, {cpu['cores']} cores"
    packages = machine["packages"]
    lines = [
        f"{device}; torch {packages['torch']}, triton {packages['triton']}; {machine['torch_threads']} CPU threads; "
        f"commit {machine['commit']}",
        "",
        f"Ceilings measured in this run: {ceilings_line(document['ceilings'])}",
        "",
        *markdown_table(b["extra_info"] for b in document["benchmarks"]),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    for path in parser.parse_args().files:
        print(markdown(json.loads(path.read_text())))


if __name__ == "__main__":
    main()
