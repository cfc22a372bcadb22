"""Hooks of the documentation site (mkdocs.yml): formulas as MathML, and links that leave docs/.

MathML needs neither a script nor another host, so the site works offline.
"""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert

_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.S)
_OUTSIDE = re.compile(r"\]\(\.\./([^)]+)\)")


def on_page_markdown(markdown: str, config: Any, **_: Any) -> str:
    """Files outside docs/ are on the site of the repository."""
    return _OUTSIDE.sub(rf"]({config.repo_url}/blob/main/\1)", markdown)


def on_page_content(content: str, **_: Any) -> str:
    """What pymdownx.arithmatex marked as a formula becomes MathML."""

    def mathml(match: re.Match[str]) -> str:
        block = match[1] == "div"
        formula = convert(html.unescape(match[2]), display="block" if block else "inline")
        return f'<div class="formula">{formula}</div>' if block else formula

    return _FORMULA.sub(mathml, content)
