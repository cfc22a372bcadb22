"""The documentation site without its tools: the menu, the names of the reference, the examples."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from tests.conftest import ROOT

DOCS = ROOT / "docs"
REFERENCE = sorted((DOCS / "reference").glob("*.md"))
OWN_EXAMPLES = [DOCS / "index.md", *REFERENCE]


def test_the_menu_has_every_page_once():
    nav = (ROOT / "mkdocs.yml").read_text().split("\nnav:\n")[1]
    pages = sorted(re.findall(r": ([\w/-]+\.md)$", nav, re.M))
    assert pages == sorted(str(p.relative_to(DOCS)) for p in DOCS.rglob("*.md"))


def find(name: str) -> object:
    """The module or attribute of a dotted name; a module comes before an attribute that shadows it."""
    parts = name.split(".")
    for size in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:size]))
        except ModuleNotFoundError:
            continue
        for attribute in parts[size:]:
            found = getattr(found, attribute)
        return found
    raise ModuleNotFoundError(name)


@pytest.mark.parametrize("page", REFERENCE, ids=lambda page: page.stem)
def test_the_reference_names_what_exists(page: Path):
    names = re.findall(r"^::: (\S+)$", page.read_text(), re.M)
    assert names and all((find(name).__doc__ or "").strip() for name in names)


def test_the_reference_has_the_public_api():
    import msdd_fast
    from msdd_fast import errors, ops

    text = "".join(page.read_text() for page in REFERENCE)
    public = {name for name in msdd_fast.__all__ if name not in ("__version__", "errors", "sampling")}
    assert all(re.search(rf"^::: msdd_fast\.(\w+\.)*{name}$", text, re.M) for name in public)
    assert text.count("\n<!-- every op -->\n") == 1  # docs/site_hooks.py puts them there
    for name in ops.__all__:
        assert importlib.import_module(f"msdd_fast.ops.{name}").__doc__ and getattr(ops, name).__doc__
    assert re.search(r"^::: msdd_fast\.errors$", text, re.M) and errors.__doc__


@pytest.mark.parametrize("page", OWN_EXAMPLES, ids=lambda page: page.stem)
def test_examples_run(page: Path):
    scope: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.S):
        exec(compile(block, str(page), "exec"), scope)
