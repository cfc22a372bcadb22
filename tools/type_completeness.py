"""Fail unless pyright knows every type of the public API: what docs/reference documents, and all that it names there.

    python tools/type_completeness.py PYRIGHT        (make types)

Attributes that a reader never meets, such as the layers inside a decoder, may stay inferred.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def documented() -> tuple[set[str], tuple[str, ...]]:
    """Dotted names of the reference, as given there and where they are defined; those of classes with a dot behind."""
    names: set[str] = set()
    classes: set[str] = set()
    every_op = [f"msdd_fast.ops.{op}.{op}" for op in importlib.import_module("msdd_fast.ops").__all__]
    for page in (ROOT / "docs/reference").glob("*.md"):
        text = page.read_text()
        for name in [*re.findall(r"^::: (\S+)$", text, re.M), *(every_op if "<!-- every op -->" in text else ())]:
            module, _, attribute = name.rpartition(".")
            found = getattr(importlib.import_module(module), attribute)
            if hasattr(found, "__qualname__"):  # not a module
                both = {name, f"{found.__module__}.{found.__qualname__}"}
                names |= both
                if isinstance(found, type):
                    classes |= {f"{n}." for n in both}
    return names, tuple(classes)


def verify(pyright: str) -> dict[str, list[str]]:
    """What pyright complains about, by symbol. It asks the first python on PATH where packages are."""
    links = ROOT / "build/types"
    links.mkdir(parents=True, exist_ok=True)
    if not (links / "msdd_fast").exists():
        (links / "msdd_fast").symlink_to(ROOT / "msdd_fast")  # alone: kernels, training and bench are not public
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = [pyright, "--verifytypes", "msdd_fast", "--ignoreexternal", "--outputjson"]
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(links)}
    said = subprocess.run(command, env=environment, text=True, capture_output=True).stdout
    report = json.loads(said)["typeCompleteness"]
    print(f"{len(report['symbols'])} symbols of msdd_fast, {100 * report['completenessScore']:.1f} % with known types")
    return {
        symbol["name"]: [f"{place(d)}{d['message']}" for d in symbol["diagnostics"]]
        for symbol in report["symbols"]
        if symbol["isExported"] and (not symbol["isTypeKnown"] or symbol["isTypeAmbiguous"])
    }


def place(diagnostic: dict[str, Any]) -> str:
    """File and line, where there is one."""
    if "range" not in diagnostic:
        return ""
    return f"{diagnostic['file']}:{diagnostic['range']['start']['line'] + 1}: "


def main() -> int:
    names, classes = documented()
    incomplete = {
        symbol: complaints
        for symbol, complaints in verify(sys.argv[1]).items()
        if symbol in names or symbol.startswith(classes)
    }
    for symbol, complaints in sorted(incomplete.items()):
        print(symbol, *complaints, sep="\n  ")
    print(f"{len(incomplete)} symbols of the public API are incomplete")
    return bool(incomplete)


if __name__ == "__main__":
    sys.exit(main())
