"""The architecture, read off the imports: layers, families, no circles.

``python -m tests.test_architecture`` prints it.

Nothing is imported here but the standard library: files are parsed.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "msdd_fast"
# Folders that are installed inside the package.
MAPPED = ("kernels", "training", "bench")
# Top down. Those of one row may import each other, as long as there is no circle.
LAYERS = (
    ("commands", "__main__"),
    ("integrations",),
    ("bench",),
    ("training",),
    ("",),  # the package itself: what `import msdd_fast` gives
    ("engine",),
    ("tokenizer",),
    ("checkpoint",),
    ("families",),
    ("layers", "sampling", "io", "metrics"),
    ("ops",),
    ("kernels", "native"),
    ("backends", "diffusion"),
    ("errors", "layout", "profiling", "_moved"),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
# The op whose files are counted, where they may be, and files there that are not part of adding an op.
OP = "sigma_gate"
COUNTED = ("msdd_fast", "kernels", "csrc", "bench", "tests", "tools", "docs/reference")
SOURCES = (".py", ".pyi", ".h", ".cpp", ".cu", ".txt", ".md", ".yml", ".toml")
LEFT_OUT = ("CHANGELOG.md", "msdd_fast/families/", "tests/families/", "tests/test_architecture.py")
LEFT_OUT += ("csrc/tests/", "tests/native/", "tests/kernels/", "tests/ops/test_odd_tensors.py")


def test_every_file_belongs_to_a_layer():
    assert {layer(m) for m in modules()} == set(LEVEL)
    assert len(list((ROOT / PACKAGE).glob("*.py"))) <= 9


def test_no_circle():
    assert circles(imports()) == []


def test_imports_go_down():
    upward = [f"{m} imports {n}" for m, n in edges() if LEVEL[layer(m)] > LEVEL[layer(n)]]
    assert upward == []


def test_no_family_imports_another():
    pairs = [(m, n) for m, n in edges() if family(m) and family(n) and family(m) != family(n)]
    assert pairs == []


def test_only_families_and_recipes_ask_which_family_it_is():
    forks = {m: found for m in modules() if may_not_fork(m) and (found := family_questions(source(m)))}
    assert forks == {}


def test_an_op_is_in_eight_files():
    """docs/writing-kernels.md lists the files that a new op touches. Nothing else may need to name it.

    Counted are the files that name one op. Left out: the family that calls it, what is written about it, and tests that
    no op must have.
    """
    table = re.findall(r"^\| `(\S+)` \|", (ROOT / "docs/writing-kernels.md").read_text(), re.M)
    listed = {name.replace("scale_shift", OP) for name in table}
    naming = {name for name in listed if OP in name and (ROOT / name).exists()}
    files = [*ROOT.glob("*.*"), *(file for folder in COUNTED for file in (ROOT / folder).rglob("*.*"))]
    for file in files:
        name = file.relative_to(ROOT).as_posix()
        if file.suffix in SOURCES and not name.startswith(LEFT_OUT) and OP in file.read_text(encoding="utf-8"):
            naming.add(name)
    assert naming == listed and len(listed) <= 8


def test_the_checks_find_what_they_look_for():
    """Each on a small bad example."""
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]
    assert circles({"a": {"b"}, "b": set()}) == []
    assert family_questions('if config.family == "ssdd": pass') == ["line 1: compares a family"]
    assert family_questions('x = "msdd" != cfg.family') == ["line 1: compares a family"]
    assert family_questions("isinstance(d, (int, UViTDecoder))") == ["line 1: asks for UViTDecoder"]
    assert family_questions("from msdd_fast.families.ssdd.presets import SSDD_PRESETS") == [
        "line 1: imports msdd_fast.families.ssdd.presets"
    ]
    assert family_questions("family_of(config).model") == []
    assert imported_by("from msdd_fast import ops\nfrom msdd_fast.ops import attention", "msdd_fast.x") == {
        "msdd_fast.ops",
        "msdd_fast.ops.attention",
    }
    assert imported_by("def f():\n    import msdd_fast.native", "msdd_fast.x") == {"msdd_fast.native"}
    typed = "if TYPE_CHECKING:\n    from msdd_fast.engine import decoder"
    assert imported_by(typed, "msdd_fast.x") == {"msdd_fast.engine.decoder"}


# --- The modules and what they import. ---


@cache
def modules() -> dict[str, Path]:
    """Every module under its installed name, but for tests that lie beside what they time."""
    found = {}
    for folder, prefix in ((PACKAGE, PACKAGE), *((f, f"{PACKAGE}.{f}") for f in MAPPED)):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join((prefix, *(p for p in parts if p != "__init__")))] = path
    return found


@cache
def source(module: str) -> str:
    return modules()[module].read_text()


def imported_by(text: str, module: str) -> set[str]:
    """Modules of ours that a text imports, anywhere in it, also for type checkers only."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names if a.name.split(".")[0] == PACKAGE}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == PACKAGE:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in modules() else node.module)
    return found - {module}


@cache
def imports() -> dict[str, set[str]]:
    known = modules()
    return {m: {n for n in imported_by(source(m), m) if n in known} for m in known}


def edges() -> Iterator[tuple[str, str]]:
    return ((m, n) for m, found in imports().items() for n in sorted(found))


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Strongly connected components of more than one module (Tarjan), sorted."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(graph.get(node, ())):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            component = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(component) > 1:
                found.append(sorted(component))

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return sorted(found)


def layer(module: str) -> str:
    return [*module.split("."), ""][1]


# --- Families. ---

FAMILIES = sorted(p.name for p in (ROOT / PACKAGE / "families").iterdir() if (p / "family.py").is_file())


def family(module: str) -> str | None:
    """The family whose folder a module lies in."""
    parts = module.split(".")
    return parts[2] if parts[1:2] == ["families"] and parts[2:] and parts[2] in FAMILIES else None


def may_not_fork(module: str) -> bool:
    """All but the families, their training recipes, and what only names things: the package itself, the old paths."""
    return layer(module) not in ("families", "_moved", "") and not module.startswith(f"{PACKAGE}.training.recipes")


def family_questions(text: str) -> list[str]:
    """Where a text compares a family's name, asks for a type of one family, or imports from a family's folder."""
    types = {name for f in FAMILIES for name in classes(f)}
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Compare):
            sides = (node.left, *node.comparators)
            if any(isinstance(s, ast.Attribute) and s.attr == "family" for s in sides) and any(
                isinstance(s, ast.Constant) and isinstance(s.value, str) for s in sides
            ):
                found.append(f"line {node.lineno}: compares a family")
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance":
            asked = {n.id for n in ast.walk(node.args[1]) if isinstance(n, ast.Name)} & types
            found += [f"line {node.lineno}: asks for {name}" for name in sorted(asked)]
        elif (
            isinstance(node, ast.ImportFrom)
            and node.module
            and any(f"{node.module}.".startswith(f"{PACKAGE}.families.{f}.") for f in FAMILIES)
        ):
            found.append(f"line {node.lineno}: imports {node.module}")
    return found


@cache
def classes(name: str) -> frozenset[str]:
    folder = ROOT / PACKAGE / "families" / name
    trees = [ast.parse(p.read_text()) for p in folder.rglob("*.py")]
    return frozenset(n.name for tree in trees for n in ast.walk(tree) if isinstance(n, ast.ClassDef))


if __name__ == "__main__":
    upward = [f"{m} -> {n}" for m, n in edges() if LEVEL[layer(m)] > LEVEL[layer(n)]]
    forks = [f"{m}: {q}" for m in modules() if may_not_fork(m) for q in family_questions(source(m))]
    print(f"{len(modules())} modules, {sum(map(len, imports().values()))} imports among them")
    print(f"circles: {len(circles(imports()))}", *(f"  {len(c)}: {', '.join(c)}" for c in circles(imports())), sep="\n")
    print(f"upward imports: {len(upward)}", *(f"  {u}" for u in upward), sep="\n")
    print(f"family questions outside families and recipes: {len(forks)}", *(f"  {f}" for f in forks), sep="\n")
    print(f"files at the top of {PACKAGE}/: {len(list((ROOT / PACKAGE).glob('*.py')))}")
