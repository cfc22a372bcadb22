"""Citations lead somewhere: docs/spec.md from the code, links and anchors between the documents."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SPEC = ROOT / "docs/spec.md"
SOURCES = {".py", ".h", ".cpp", ".cu", ".cuh", ".sh"}
# Drafts that are not part of the repository.
UNPUBLISHED = re.compile(r"\b(?:SPEC|DESIGN|LAYOUT\.md|STYLE\.md)\b")


def tracked(*suffixes: str) -> list[Path]:
    """Tracked files with these suffixes, but for this one, whose examples are wrong on purpose."""
    run = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if run.returncode:
        pytest.skip("not a git checkout")
    files = [ROOT / name for name in run.stdout.splitlines()]
    return [f for f in files if f.suffix in suffixes and f.is_file() and f != Path(__file__).resolve()]


def prose(markdown: str) -> str:
    """Without fenced code."""
    return re.sub(r"^```.*?^```", "", markdown, flags=re.M | re.S)


def anchors(markdown: str, level: str = "#{1,6}") -> set[str]:
    """GitHub's anchors of the headings: lower case, no punctuation, hyphens; repeated ones are numbered."""
    found: set[str] = set()
    for title in re.findall(rf"^{level} +(.+?) *$", prose(markdown), re.M):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title)
        slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        count = sum(re.fullmatch(rf"{re.escape(slug)}(-\d+)?", a) is not None for a in found)
        found.add(f"{slug}-{count}" if count else slug)
    return found


def stale(text: str) -> list[str]:
    """Names of unpublished documents."""
    return UNPUBLISHED.findall(text)


def cited(text: str) -> set[str]:
    """Anchors of docs/spec.md that ``text`` cites."""
    return set(re.findall(r"docs/spec\.md#([\w-]+)", text))


def broken_links(document: Path) -> list[str]:
    """Relative links of a Markdown file whose file or anchor does not exist."""
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(document.read_text())):
        if "://" in target or target.startswith("mailto:"):
            continue
        name, _, anchor = target.partition("#")
        file = document.parent / name if name else document
        if not file.exists() or (anchor and file.suffix == ".md" and anchor not in anchors(file.read_text())):
            broken.append(target)
    return broken


def test_nothing_cites_an_unpublished_document():
    found = {str(f.relative_to(ROOT)): hits for f in tracked(*SOURCES, ".md") if (hits := stale(f.read_text()))}
    assert not found


def test_every_citation_of_the_specification_has_a_section():
    known = anchors(SPEC.read_text())
    wrong = {str(f.relative_to(ROOT)): bad for f in tracked(*SOURCES, ".md") if (bad := cited(f.read_text()) - known)}
    assert not wrong


def test_every_section_of_the_specification_is_cited_by_the_code():
    code = [f for f in tracked(*SOURCES) if f.relative_to(ROOT).parts[0] != "tests"]
    assert anchors(SPEC.read_text(), "##") == set().union(*(cited(f.read_text()) for f in code))


def test_links_between_the_documents():
    documents = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    assert {SPEC, ROOT / "README.md", ROOT / "CONTRIBUTING.md"} <= set(documents)
    assert not {str(d.relative_to(ROOT)): bad for d in documents if (bad := broken_links(d))}


def test_the_checks_can_fail(tmp_path):
    assert stale("alpha and beta (SPEC A3), Philox (DESIGN section 7), SPEC-SSDD 1.3, see LAYOUT.md") == [
        "SPEC",
        "DESIGN",
        "SPEC",
        "LAYOUT.md",
    ]
    assert stale("the specification, docs/spec.md#noise, SPEC_JOINT, a design") == []
    assert cited("(docs/spec.md#time-grids; paper Eq. 3), docs/spec.md#cfg.") == {"time-grids", "cfg"}
    page = "# Page\n\n## Authors' checkpoint\n\n```bash\n## no heading\n```\n\n### A `b` c\n\n## Twice\n\n## Twice\n"
    assert anchors(page) == {"page", "authors-checkpoint", "a-b-c", "twice", "twice-1"}
    assert anchors(page, "##") == {"authors-checkpoint", "twice", "twice-1"}
    (tmp_path / "there.md").write_text(page)
    here = tmp_path / "here.md"
    good = "# Here\n\n[a](there.md) [b](there.md#twice-1) [c](#here) [d](https://example.org/x#y)\n"
    here.write_text(good)
    assert broken_links(here) == []
    here.write_text(good + "[e](gone.md) [f](there.md#no-heading) [g](#nowhere)\n```\n[h](gone.md)\n```\n")
    assert broken_links(here) == ["gone.md", "there.md#no-heading", "#nowhere"]
