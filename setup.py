"""Builds msdd-fast: the Python packages, and the compiled extension ``msdd_fast._C`` by running CMake.

Never imports torch. Without a compiler, or when the build fails, the install still succeeds in pure Python and says
why in one line; ``msdd_fast/_build_info.json`` keeps the reason for the error message of a later request.

    MSDD_FAST_BUILD_EXT   auto (default): build if possible; 1: a failure is fatal; 0: do not build
    MSDD_FAST_BUILD_CUDA  auto (default): build csrc/cuda if nvcc is found; 1: a failure is fatal; 0: CPU only
    MSDD_FAST_CUDA_ARCHS  default "80;90"; the newest also gets PTX
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
# Top-level folders that are installed inside the package (the name `kernels` belongs to another project).
MAPPED = ("kernels", "training", "bench")


class BuildError(Exception):
    """The extension cannot be built; the message is the one line that the user sees."""


def choice(variable: str) -> str:
    """The value of an environment switch: "0", "1" or "auto"."""
    value = os.environ.get(variable, "auto")
    if value not in ("0", "1", "auto"):
        raise SystemExit(f"{variable} must be 0, 1 or auto, got {value!r}")
    return value


def tool(name: str, directory_attribute: str) -> str:
    """Path of cmake or ninja: from its pip package (which the build requirements ask for), else from PATH."""
    suffix = ".exe" if os.name == "nt" else ""
    try:
        bundled = Path(getattr(importlib.import_module(name), directory_attribute)) / (name + suffix)
    except (ImportError, AttributeError):
        bundled = None
    found = str(bundled) if bundled and bundled.is_file() else shutil.which(name)
    if not found:
        raise BuildError(f"{name} was not found (pip install {name})")
    return found


def check_requirements() -> None:
    """Raises BuildError when there is no C++ compiler or no pybind11."""
    if sys.platform != "win32":
        wanted = [os.environ["CXX"].split()[0]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
        if not any(shutil.which(name) for name in wanted):
            raise BuildError(f"no C++ compiler was found (looked for {', '.join(wanted)}; install g++ or set CXX)")
    try:
        importlib.import_module("pybind11")
    except ImportError:
        raise BuildError("pybind11 was not found (pip install pybind11)") from None


def run(command: list[str]) -> None:
    """Runs a build step; on failure prints its output and raises BuildError with the first line of error."""
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    if result.returncode == 0:
        return
    print(result.stdout, file=sys.stderr)
    lines = [line.strip() for line in result.stdout.splitlines()]
    hits = [i for i, line in enumerate(lines) if "error" in line.lower()]
    # CMake writes "CMake Error at file:line:" and the message on the lines below it.
    first = " ".join(line for line in lines[hits[0] : hits[0] + 3] if line) if hits else f"exit {result.returncode}"
    raise BuildError(f"{Path(command[0]).name} failed: {first[:300]}")


def cmake_build(directory: Path, cuda: str, cmake: str, ninja: str) -> tuple[Path, dict]:
    """Configures and builds in ``directory``; returns the built module and what CMake says it is."""
    cache = directory / "CMakeCache.txt"
    # A cache from a tree that was copied or moved is of no use, and CMake would refuse it.
    moved = cache.is_file() and f"CMAKE_HOME_DIRECTORY:INTERNAL={ROOT.as_posix()}\n" not in cache.read_text()
    run(
        [
            cmake,
            *(["--fresh"] if moved else []),
            *("-S", str(ROOT), "-B", str(directory), "-G", "Ninja"),
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            "-DMSDD_FAST_BUILD_TESTS=OFF",
            f"-DMSDD_FAST_BUILD_CUDA={cuda}",
            f"-DMSDD_FAST_CUDA_ARCHS={os.environ.get('MSDD_FAST_CUDA_ARCHS', '80;90')}",
        ]
    )
    jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
    run([cmake, "--build", str(directory), "--parallel", jobs, "--target", "_C"])
    modules = list((directory / "module").glob("_C*"))
    if len(modules) != 1:
        raise BuildError(f"expected one _C module in {directory / 'module'}, got {len(modules)}")
    return modules[0], json.loads((directory / "facts.json").read_text())


def build_extension(directory: Path, target: Path) -> dict:
    """Builds the extension into the file ``target`` and returns the facts for _build_info.json.

    Raises SystemExit if it fails although MSDD_FAST_BUILD_EXT or MSDD_FAST_BUILD_CUDA is 1.
    """
    wanted, cuda = choice("MSDD_FAST_BUILD_EXT"), choice("MSDD_FAST_BUILD_CUDA")
    target.unlink(missing_ok=True)  # never leave an older build beside an info file that says "not built"
    try:
        if wanted == "0":
            raise BuildError("skipped because MSDD_FAST_BUILD_EXT=0")
        tools = tool("cmake", "CMAKE_BIN_DIR"), tool("ninja", "BIN_DIR")
        check_requirements()
        try:
            module, facts = cmake_build(directory, cuda, *tools)
        except BuildError as error:
            has_cuda = any((ROOT / "csrc" / "cuda").rglob("*.cu"))
            if cuda != "auto" or not has_cuda:
                raise
            print(f"msdd-fast: trying again without CUDA, since {error}", file=sys.stderr)
            module, facts = cmake_build(directory, "0", *tools)
            facts["cuda_reason"] = str(error)
    except BuildError as error:
        if wanted != "0" and "1" in (wanted, cuda):
            raise SystemExit(f"msdd-fast: the extension could not be built: {error}") from None
        print(f"msdd-fast: installing without the compiled extension: {error}", file=sys.stderr)
        why = str(error)
        return {"compiled": False, "reason": why, "compiler": None, "cuda": False, "cuda_reason": why, "cuda_archs": []}
    target.parent.mkdir(parents=True, exist_ok=True)
    # Copied beside and renamed: a running process may have the old file mapped.
    partial = target.with_name(target.name + ".partial")
    shutil.copyfile(module, partial)
    os.replace(partial, target)
    return {"compiled": True, "reason": "", **facts}


class CMakeBuild(build_ext):
    """build_ext that runs CMake, in place for editable installs and into a temporary directory otherwise."""

    def run(self) -> None:
        directory = ROOT / "build" / f"ext-{sys.implementation.cache_tag}"
        with tempfile.TemporaryDirectory() as temporary:
            name = self.extensions[0].name
            target = Path(self.get_ext_fullpath(name)).resolve()
            info = build_extension(directory if self.inplace else Path(temporary), target)
            info["version"] = self.distribution.get_version()
            info["python"] = platform.python_version()
            target.parent.mkdir(parents=True, exist_ok=True)
            (target.parent / "_build_info.json").write_text(json.dumps(info, indent=2) + "\n")


def packages() -> list[str]:
    """All packages under their installed names."""
    found = find_packages(str(ROOT), include=["msdd_fast", "msdd_fast.*"])
    for folder in MAPPED:
        found += [f"msdd_fast.{folder}", *(f"msdd_fast.{folder}.{p}" for p in find_packages(str(ROOT / folder)))]
    return found


if __name__ == "__main__":
    setup(
        packages=packages(),
        package_dir={"msdd_fast": "msdd_fast", **{f"msdd_fast.{folder}": folder for folder in MAPPED}},
        ext_modules=[Extension("msdd_fast._C", sources=[], optional=True)],
        cmdclass={"build_ext": CMakeBuild},
    )
