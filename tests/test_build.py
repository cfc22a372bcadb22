"""Installing without a compiler, the reasons that users hear, and what `import msdd_fast` loads."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import msdd_fast
from msdd_fast import backends
from msdd_fast.errors import BackendUnavailableError
from tests.conftest import ROOT


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the sources, without anything built."""
    copy = tmp_path / "tree"
    ignore = shutil.ignore_patterns("__pycache__", "_C*", "_build_info.json", "assets", "results")
    for name in ("msdd_fast", "kernels", "training", "bench", "csrc"):
        shutil.copytree(ROOT / name, copy / name, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "CMakeLists.txt", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    return copy


def run_setup(tree: Path, *command: str, **environment: str) -> subprocess.CompletedProcess:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("MSDD_FAST_") and k not in ("CXX", "CC")}
    return subprocess.run(
        [sys.executable, "setup.py", *command],
        cwd=tree,
        env={**inherited, **environment},
        text=True,
        capture_output=True,
        timeout=300,
    )


def info_of(tree: Path) -> dict:
    return json.loads((tree / "msdd_fast/_build_info.json").read_text())


def our_lines(result: subprocess.CompletedProcess) -> list[str]:
    return [line for line in result.stderr.splitlines() if line.startswith("msdd-fast:")]


def test_without_a_compiler_the_install_succeeds_and_the_error_says_so(tree, tmp_path):
    result = run_setup(tree, "build_ext", "--inplace", PATH=str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert len(our_lines(result)) == 1 and "no C++ compiler was found" in our_lines(result)[0]
    info = info_of(tree)
    assert info["compiled"] is False and info["cuda"] is False and "install g++ or set CXX" in info["reason"]
    assert info["version"] == msdd_fast.__version__ and info["python"].startswith("3.")

    # Without the finder of an editable install, which would lend the copy the extension of the real tree.
    script = """
import sys
sys.meta_path[:] = [f for f in sys.meta_path if "__editable__" not in getattr(f, "__module__", "")]
from msdd_fast import backends
try:
    backends.load_extension()
except backends.BackendUnavailableError as error:
    print(error)
"""
    said = subprocess.run([sys.executable, "-c", script], cwd=tree, text=True, capture_output=True, check=True).stdout
    assert "was not built: no C++ compiler was found" in said
    assert f"MSDD_FAST_BUILD_EXT=1 pip install --no-deps -e {tree}" in said


def test_without_cmake_the_install_succeeds_and_removes_an_older_build(tree, tmp_path):
    hidden = tmp_path / "hidden"  # makes `import cmake` fail, as if its pip package were absent
    hidden.mkdir()
    (hidden / "cmake.py").write_text("raise ImportError\n")
    older = tree / "msdd_fast" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    older.write_bytes(b"")
    result = run_setup(tree, "build_ext", "--inplace", PATH=str(tmp_path), PYTHONPATH=str(hidden))
    assert result.returncode == 0, result.stderr
    assert info_of(tree)["reason"] == "cmake was not found (pip install cmake)"
    assert not older.exists()


def test_a_failing_build_is_told_or_fatal(tree):
    if not backends.extension_status()[0]:
        pytest.skip(f"no tools to build with: msdd_fast._C {backends.extension_status()[1]}")
    for source in (tree / "csrc").rglob("*.cpp"):
        source.write_text("#error deliberately broken\n")
    result = run_setup(tree, "build_ext", "--inplace")
    assert result.returncode == 0, result.stderr
    assert "deliberately broken" in info_of(tree)["reason"] and len(our_lines(result)) == 1
    fatal = run_setup(tree, "build_ext", "--inplace", MSDD_FAST_BUILD_EXT="1")
    assert fatal.returncode != 0 and "could not be built" in fatal.stderr and "deliberately broken" in fatal.stderr


def test_build_switches(tree):
    skipped = run_setup(tree, "build_ext", "--inplace", MSDD_FAST_BUILD_EXT="0", MSDD_FAST_BUILD_CUDA="1")
    assert skipped.returncode == 0
    assert info_of(tree)["reason"] == "skipped because MSDD_FAST_BUILD_EXT=0"
    wrong = run_setup(tree, "build_ext", "--inplace", MSDD_FAST_BUILD_EXT="yes")
    assert wrong.returncode != 0 and "MSDD_FAST_BUILD_EXT must be 0, 1 or auto, got 'yes'" in wrong.stderr


def test_folders_are_installed_inside_the_package(tree, tmp_path):
    built = tmp_path / "lib"
    result = run_setup(tree, "-q", "build", "--build-lib", str(built), MSDD_FAST_BUILD_EXT="0")
    assert result.returncode == 0, result.stderr
    assert [p.name for p in built.iterdir()] == ["msdd_fast"]  # no top-level kernels, training or bench
    for name in ("kernels/__init__.py", "training/__init__.py", "bench/__init__.py", "models/mmdit.py", "py.typed"):
        assert (built / "msdd_fast" / name).is_file(), name
    assert json.loads((built / "msdd_fast/_build_info.json").read_text())["compiled"] is False


def test_setup_is_thin():
    source = (ROOT / "setup.py").read_text()
    assert len(source.splitlines()) <= 200
    assert "import torch" not in source and "from torch" not in source


@pytest.fixture
def probe(tmp_path, monkeypatch):
    """backends as seen by a package whose _build_info.json is as given and whose _C does not load."""
    monkeypatch.setattr(backends, "_PACKAGE", tmp_path / "msdd_fast")
    monkeypatch.setitem(sys.modules, "msdd_fast._C", None)  # makes the import raise ModuleNotFoundError
    (tmp_path / "msdd_fast").mkdir()

    def message(info: str | None) -> str:
        backends._probe.cache_clear()
        if info is not None:
            (tmp_path / "msdd_fast/_build_info.json").write_text(info)
        with pytest.raises(BackendUnavailableError) as error:
            backends.load_extension()
        assert backends.extension_status() == (False, str(error.value).split("which ", 1)[1])
        return str(error.value)

    yield message
    backends._probe.cache_clear()


def test_reasons_why_the_extension_is_missing(probe):
    assert "was not built: the package was never installed" in probe(None)
    assert "was not built: the package was never installed" in probe("{ damaged")
    assert "was not built: no nvcc. To build it: MSDD_FAST_BUILD_EXT=1 pip install --force-reinstall" in probe(
        json.dumps({"compiled": False, "reason": "no nvcc"})
    )
    assert "was built for Python 2.7.18, but this is Python 3." in probe(
        json.dumps({"compiled": True, "python": "2.7.18"})
    )
    here = sys.version.split()[0]
    assert "was built but cannot be loaded: import of msdd_fast._C halted" in probe(
        json.dumps({"compiled": True, "python": here})
    )


def test_import_is_lean():
    """No Triton, no extension, no CUDA context, and less than 0.3 s beyond `import torch`."""
    script = """
import json, sys, time
import torch
before, start = set(sys.modules), time.perf_counter()
import msdd_fast
seconds = time.perf_counter() - start
new = sorted(set(sys.modules) - before)
print(json.dumps({"seconds": seconds, "new": new, "cuda": torch.cuda.is_initialized()}))
"""
    runs = [
        json.loads(subprocess.run([sys.executable, "-c", script], capture_output=True, check=True, cwd=ROOT).stdout)
        for _ in range(3)
    ]
    for run in runs:
        loaded = {name for name in run["new"] if name.split(".")[0] == "triton" or name == "msdd_fast._C"}
        assert not loaded and "msdd_fast.native" not in run["new"] and not run["cuda"]
    assert statistics.median(run["seconds"] for run in runs) < 0.3
