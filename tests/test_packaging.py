"""The files round the code: what a source distribution holds, and what repeats a fact that stands elsewhere."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import msdd_fast
from tests.conftest import ROOT

# Tracked, but of use only in a checkout.
LEFT_OUT = (".ci/", ".git", ".pre-commit-config.yaml", "bench/results/")


def tracked_files() -> list[str]:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [name for name in listed.split("\0") if name and (ROOT / name).exists()]


def test_the_source_distribution_holds_what_is_tracked_and_nothing_built(tmp_path: Path):
    tree, tracked = tmp_path / "tree", tracked_files()
    for name in tracked:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).symlink_to(ROOT / name)
    (tree / "msdd_fast/_build_info.json").write_text("{}")
    (tree / "msdd_fast/_C.cpython-310-x86_64-linux-gnu.so").write_text("")
    command = [sys.executable, "setup.py", "-q", "sdist", "--formats", "tar", "-d", str(tmp_path)]
    subprocess.run(command, cwd=tree, check=True, capture_output=True, timeout=300)
    (archive,) = tmp_path.glob("*.tar")
    with tarfile.open(archive) as tar:
        packed = {member.name.split("/", 1)[1] for member in tar if not member.isdir()}
    made = {"PKG-INFO", "setup.cfg"} | {name for name in packed if name.startswith("msdd_fast.egg-info/")}
    assert packed - made == {name for name in tracked if not name.startswith(LEFT_OUT)}


def test_pre_commit_runs_what_make_lint_runs():
    makefile, hooks = (ROOT / "Makefile").read_text(), ROOT / ".pre-commit-config.yaml"
    if not hooks.exists():
        pytest.skip("not a checkout")
    lint = re.search(r"^lint:.*\n((?:\t.*\n)+)", makefile, re.M)
    assert lint is not None
    commands = [line.replace("$(BIN)", ".venv/bin").replace("$(MAKE)", "make") for line in lint[1].split("\n\t")]
    expected = {re.sub(r"( \.| \$\(CPP_FILES\))?\s*$", "", line).strip() for line in commands}
    assert set(re.findall(r"^ +entry: (.*)$", hooks.read_text(), re.M)) == expected


def test_every_python_that_is_claimed_is_tested():
    workflow = ROOT / ".github/workflows/ci.yml"
    if not workflow.exists():
        pytest.skip("not a checkout")
    pyproject = (ROOT / "pyproject.toml").read_text()
    claimed = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', pyproject)
    matrix = re.search(r"^ +python: \[(.*)\]$", workflow.read_text(), re.M)
    assert matrix is not None and re.findall(r'"([\d.]+)"', matrix[1]) == claimed
    assert f'requires-python = ">={claimed[0]}"' in pyproject


def test_the_citation_names_this_version():
    assert f"\nversion: {msdd_fast.__version__}\n" in (ROOT / "CITATION.cff").read_text()
