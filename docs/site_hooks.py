"""Hooks of the documentation site (mkdocs.yml): formulas as MathML, links that leave docs/, and the list of ops.

MathML needs neither a script nor another host, so the site works offline.
"""

from __future__ import annotations

import ast
import html
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert

_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.S)
_EVERY_OP = "<!-- every op -->"
_OP = """
::: msdd_fast.ops.{op}.{op}
    options: {{ heading: msdd_fast.ops.{op}, toc_label: {op} }}

::: msdd_fast.ops.{op}
    options: {{ show_root_heading: false, show_root_toc_entry: false, members: false }}
"""
_OUTSIDE = re.compile(r"\]\(\.\./([^)]+)\)")


def on_page_markdown(markdown: str, config: Any, **_: Any) -> str:
    """The list of ops; and files outside docs/ are on the site of the repository."""
    if _EVERY_OP in markdown:
        source = Path(config.config_file_path).parent / "msdd_fast/ops/__init__.py"
        markdown = markdown.replace(_EVERY_OP, "".join(_OP.format(op=op) for op in _ops(source)))
    return _OUTSIDE.sub(rf"]({config.repo_url}/blob/main/\1)", markdown)


def _ops(source: Path) -> list[str]:
    """``__all__`` of msdd_fast.ops, which cannot be imported here: there is no torch."""
    assignments = (node for node in ast.parse(source.read_text()).body if isinstance(node, ast.Assign))
    (names,) = (a.value for a in assignments if isinstance(a.targets[0], ast.Name) and a.targets[0].id == "__all__")
    found: list[str] = ast.literal_eval(names)
    return found


def on_page_content(content: str, **_: Any) -> str:
    """What pymdownx.arithmatex marked as a formula becomes MathML."""

    def mathml(match: re.Match[str]) -> str:
        block = match[1] == "div"
        formula = convert(html.unescape(match[2]), display="block" if block else "inline")
        return f'<div class="formula">{formula}</div>' if block else formula

    return _FORMULA.sub(mathml, content)
