"""The results of the op benchmarks as a table, from the extra_info that pytest-benchmark stored.

python -m msdd_fast.bench.report.op_table FILE.json [...]     (prints Markdown)
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from msdd_fast.bench.report.documents import read_json, taken_for
from msdd_fast.bench.report.text import aligned, ceilings_line, markdown_table
from msdd_fast.io.program import run_program

HEADER = ("op", "px", "dtype", "batch", "provider", "median us", "GB/s", "% of copy", "speed-up", "img/s", "max error")
LEFT = (1, 3)  # dtype and provider, without the op


def cells(info: Mapping[str, Any]) -> tuple[str, ...]:
    """One row; the speed-up is against the first baseline of the same case."""
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
    """Lines for a terminal: one table per op."""
    lines: list[str] = []
    for op, group in groupby((cells(i) for i in infos), key=lambda row: row[0]):
        lines += [*([""] if lines else []), op, *aligned([HEADER[1:], *(row[1:] for row in group)], LEFT)]
    return lines


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
        *markdown_table([HEADER, *(cells(b["extra_info"]) for b in document["benchmarks"])]),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    for path in parser.parse_args().files:
        what = "a JSON file of pytest-benchmark"
        document = read_json(path, what)
        with taken_for(path, what):
            print(markdown(document))


if __name__ == "__main__":
    sys.exit(run_program(main))
