"""Installing without a compiler, the reasons that users hear, and what `import msdd_fast` loads."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

import msdd_fast
from msdd_fast import backends
from msdd_fast.backends import cuda, extension
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
from msdd_fast.errors import BackendUnavailableError
try:
    backends.load_extension()
except BackendUnavailableError as error:
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
    result = run_setup(tree, "build_ext", "--inplace", MSDD_FAST_BUILD_CUDA="0")
    assert result.returncode == 0, result.stderr
    assert "deliberately broken" in info_of(tree)["reason"] and len(our_lines(result)) == 1
    fatal = run_setup(tree, "build_ext", "--inplace", MSDD_FAST_BUILD_EXT="1", MSDD_FAST_BUILD_CUDA="0")
    assert fatal.returncode != 0 and "could not be built" in fatal.stderr and "deliberately broken" in fatal.stderr


def test_build_switches(tree):
    skipped = run_setup(tree, "build_ext", "--inplace", MSDD_FAST_BUILD_EXT="0", MSDD_FAST_BUILD_CUDA="1")
    assert skipped.returncode == 0
    assert info_of(tree)["reason"] == "skipped because MSDD_FAST_BUILD_EXT=0"
    wrong = run_setup(tree, "build_ext", "--inplace", MSDD_FAST_BUILD_EXT="yes")
    assert wrong.returncode != 0 and "MSDD_FAST_BUILD_EXT must be 0, 1 or auto, got 'yes'" in wrong.stderr


def configure(tree: Path, cuda: str, **environment: str) -> subprocess.CompletedProcess:
    """CMake alone, as far as what would be built; the facts are then in tree/out/facts.json."""
    setup = importlib.import_module("setup")
    command = [setup.tool("cmake", "CMAKE_BIN_DIR"), "-S", tree, "-B", tree / "out", "-G", "Ninja"]
    command += [f"-DCMAKE_MAKE_PROGRAM={setup.tool('ninja', 'BIN_DIR')}", f"-DPython_EXECUTABLE={sys.executable}"]
    command += [f"-DMSDD_FAST_BUILD_CUDA={cuda}", "-DMSDD_FAST_CUDA_ARCHS=90;80"]
    return subprocess.run(command, env={**os.environ, **environment}, text=True, capture_output=True, timeout=300)


def facts_of(tree: Path) -> dict:
    return json.loads((tree / "out/facts.json").read_text())


def test_what_is_built_of_cuda(tree, monkeypatch):
    """Nothing if not wanted; without nvcc nothing or an error; else every architecture, with PTX for the newest."""
    if not backends.extension_status()[0]:
        pytest.skip(f"no tools to build with: msdd_fast._C {backends.extension_status()[1]}")
    monkeypatch.syspath_prepend(str(ROOT))
    assert configure(tree, "0").returncode == 0
    assert facts_of(tree)["cuda"] is False and facts_of(tree)["cuda_reason"] == "MSDD_FAST_BUILD_CUDA=0"
    hidden = {"CUDACXX": "/nowhere/nvcc"}
    assert configure(tree, "auto", **hidden).returncode == 0
    assert facts_of(tree)["cuda"] is False and "no working nvcc was found" in facts_of(tree)["cuda_reason"]
    failed = configure(tree, "1", **hidden)
    assert failed.returncode != 0 and "MSDD_FAST_BUILD_CUDA=1, but no working nvcc was found" in failed.stderr
    if backends.build_info().get("cuda"):
        shutil.rmtree(tree / "out")  # CMake remembers that it found none
        built = configure(tree, "1")
        assert built.returncode == 0, built.stderr
        assert facts_of(tree)["cuda"] is True and facts_of(tree)["cuda_archs"] == ["80", "90"]
        ninja = (tree / "out/build.ninja").read_text()
        assert all(f"code=[{c}]" in ninja for c in ("sm_80", "compute_90,sm_90"))


@pytest.mark.parametrize(
    ("archs", "versions", "capability", "verdict"),
    [
        (["80", "90"], (13000, 13000), (9, 0), "CUDA 13.0, sm_90"),
        (["80", "90"], (13010, 13000), (8, 6), "CUDA 13.0, sm_86"),  # machine code of sm_80
        (["80", "90"], (13000, 13010), (10, 0), "CUDA 13.1, sm_100"),  # PTX of sm_90
        (["80", "90"], (12080, 13000), (9, 0), "was built with CUDA 13.0, but the driver knows CUDA 12.8: install a"),
        (["80", "90"], (13000, 13000), (7, 5), "was built for sm_80, sm_90, but this GPU is sm_75. To build it: MSDD_"),
        (["86", "90"], (13000, 13000), (8, 0), "was built for sm_86, sm_90, but this GPU is sm_80. To build it: MSDD_"),
        (["90"], (13000, 13000), (8, 9), "was built for sm_90, but this GPU is sm_89. To build it: MSDD_FAST_CUDA_ARC"),
    ],
)
def test_which_gpus_the_build_serves(archs, versions, capability, verdict):
    ok, reason = cuda._runs_on(archs, versions, capability)
    assert reason.startswith(verdict) and ok == verdict.startswith("CUDA")
    if not ok:
        assert "MSDD_FAST_BUILD_CUDA=1 MSDD_FAST_BUILD_EXT=1 pip install" in reason


def test_reasons_why_the_cuda_kernels_cannot_run(monkeypatch):
    assert cuda.can_use_cuda(torch.zeros(1)) == (False, "works on CUDA tensors, got cpu")
    here = torch.version.cuda
    for version, module, info, reason in (
        (None, object(), {}, "needs an NVIDIA GPU, and this PyTorch is not built for CUDA"),
        ("13.0", None, {}, "was not built: no compiler"),
        (
            "13.0",
            object(),
            {"cuda_reason": "no nvcc"},
            "was built without CUDA: no nvcc. To build it: MSDD_FAST_BUILD_",
        ),
    ):
        monkeypatch.setattr(torch.version, "cuda", version)
        monkeypatch.setattr(cuda, "_probe", lambda module=module: (module, "was not built: no compiler"))
        monkeypatch.setattr(cuda, "build_info", lambda info=info: info)
        cuda._cuda_status.cache_clear()
        ok, said = cuda.cuda_status(0)
        assert not ok and said.startswith(reason)
    monkeypatch.setattr(torch.version, "cuda", here)
    cuda._cuda_status.cache_clear()


def test_folders_are_installed_inside_the_package(tree, tmp_path):
    built = tmp_path / "lib"
    result = run_setup(tree, "-q", "build", "--build-lib", str(built), MSDD_FAST_BUILD_EXT="0")
    assert result.returncode == 0, result.stderr
    assert [p.name for p in built.iterdir()] == ["msdd_fast"]  # no top-level kernels, training or bench
    for name in (
        "kernels/__init__.py",
        "training/__init__.py",
        "bench/__init__.py",
        "families/msdd/mmdit.py",
        "py.typed",
    ):
        assert (built / "msdd_fast" / name).is_file(), name
    assert json.loads((built / "msdd_fast/_build_info.json").read_text())["compiled"] is False


def test_setup_is_thin():
    source = (ROOT / "setup.py").read_text()
    assert len(source.splitlines()) <= 200
    assert "import torch" not in source and "from torch" not in source


@pytest.fixture
def probe(tmp_path, monkeypatch):
    """backends as seen by a package whose _build_info.json is as given and whose _C does not load."""
    monkeypatch.setattr(extension, "_PACKAGE", tmp_path / "msdd_fast")
    monkeypatch.setitem(sys.modules, "msdd_fast._C", None)  # makes the import raise ModuleNotFoundError
    (tmp_path / "msdd_fast").mkdir()

    def message(info: str | None) -> str:
        extension._probe.cache_clear()
        if info is not None:
            (tmp_path / "msdd_fast/_build_info.json").write_text(info)
        with pytest.raises(BackendUnavailableError) as error:
            backends.load_extension()
        assert backends.extension_status() == (False, str(error.value).split("which ", 1)[1])
        return str(error.value)

    yield message
    extension._probe.cache_clear()


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


def test_import_is_lean(tmp_path):
    """No Triton, no extension, no CUDA context; at most a fifth of what `import torch` takes (0.3 s of 1.5 s).

    A ratio, because machines differ; in processor time and once in up to five tries, because other work must not
    count; once Python has its bytecode; and with torch's objects frozen, because the collector may look through all of
    them during whatever import comes next.
    """
    script = """
import gc, json, sys, time
start = time.process_time()
import torch
gc.freeze()
before, middle = set(sys.modules), time.process_time()
import msdd_fast
msdd_fast.Tokenizer, msdd_fast.accelerate, msdd_fast.sampling
ours = time.process_time() - middle
new = sorted(set(sys.modules) - before)
print(json.dumps({"ours": ours, "torch": middle - start, "new": new, "cuda": torch.cuda.is_initialized()}))
"""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    environment["PYTHONPYCACHEPREFIX"] = str(tmp_path)
    ratios = []  # the first is that of a run that writes bytecode
    while len(ratios) < 2 or (min(ratios[1:]) >= 0.2 and len(ratios) < 6):
        command = [sys.executable, "-c", script]
        run = json.loads(subprocess.run(command, capture_output=True, check=True, cwd=ROOT, env=environment).stdout)
        loaded = {name for name in run["new"] if name.split(".")[0] == "triton" or name == "msdd_fast._C"}
        assert not loaded and not run["cuda"]
        ratios.append(run["ours"] / run["torch"])
    assert min(ratios[1:]) < 0.2
