"""The C++ part under sanitizers: races in the thread team, accesses outside tensors, undefined behaviour.

The short tests compile the thread team alone. The slow ones build everything, run the C++ tests, and the tests of the
ops with an extension that reports the first bad access of a kernel.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

COMPILER = next((c for c in (os.environ.get("CXX"), "c++", "g++", "clang++") if c and shutil.which(c)), None)
if COMPILER is None:
    pytest.skip("no C++ compiler", allow_module_level=True)

SANITIZERS = ["thread", "address,undefined"]
OPTIONS = {
    "TSAN_OPTIONS": "halt_on_error=1",
    "ASAN_OPTIONS": "detect_leaks=0",  # Python's own are many
    "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
}


def compiled(folder: Path, sanitizer: str, *sources: Path) -> Path:
    program = folder / "program"
    flags = [f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all", "-std=c++17", "-O1", "-g", "-pthread"]
    command = [COMPILER, *flags, f"-I{ROOT / 'csrc/include'}", *map(str, sources), "-o", str(program), "-ldl"]
    subprocess.run(command, check=True)
    return program


def run(*command: object, **environment: str) -> str:
    result = subprocess.run(
        list(map(str, command)), env={**os.environ, **OPTIONS, **environment}, capture_output=True, text=True, cwd=ROOT
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-8000:]
    return result.stdout


@pytest.fixture(params=SANITIZERS)
def sanitizer(request, tmp_path):
    """Skips where a program built with it does not run, for want of a library or because of the kernel's settings."""
    source = tmp_path / "nothing.cpp"
    source.write_text("int main() { return 0; }\n")
    try:
        works = subprocess.run([compiled(tmp_path, request.param, source)], capture_output=True).returncode == 0
    except subprocess.CalledProcessError:
        works = False
    if not works:
        pytest.skip(f"{COMPILER} -fsanitize={request.param} gives no program that runs here")
    return request.param


def test_the_thread_team(sanitizer, tmp_path):
    """Teams, the pool, late helpers, exceptions in tasks, several leaders at once."""
    runtime = ROOT / "csrc/cpu/runtime"
    sources = (runtime / "parallel.cpp", runtime / "program.cpp", ROOT / "csrc/tests/test_program.cpp")
    run(compiled(tmp_path, sanitizer, *sources), 20)


def test_a_sanitizer_sees_a_race(tmp_path, sanitizer):
    """Else the test above could not fail."""
    source = tmp_path / "wrong.cpp"
    source.write_text(
        """
        #include "msdd_fast/detail/parallel.h"
        #include <chrono>
        #include <thread>
        #include <vector>
        int main() {
            std::vector<long> sums(4);
            long sum = 0;
            for (int i = 0; i < 100; ++i)
                msdd_fast::run_on_teams(3, {[&] {
                    msdd_fast::run_tasks(8, [&](std::int64_t k) {
                        sum += k;
                        sums.data()[k] = k;
                        std::this_thread::sleep_for(std::chrono::milliseconds(1));  // helpers come, however busy it is
                    });
                }});
            return 0;
        }
        """
    )
    program = compiled(tmp_path, sanitizer, ROOT / "csrc/cpu/runtime/parallel.cpp", source)
    result = subprocess.run([program], env={**os.environ, **OPTIONS}, capture_output=True, text=True)
    assert result.returncode != 0
    assert ("data race" if sanitizer == "thread" else "heap-buffer-overflow") in result.stderr


def build(sanitizer: str) -> Path:
    """Everything with a sanitizer, in a folder of build/ that the next run uses again."""
    folder = ROOT / "build" / f"sanitize-{sanitizer.replace(',', '-')}"
    options = ("-DMSDD_FAST_BUILD_CUDA=0", f"-DMSDD_FAST_SANITIZE={sanitizer}", f"-DPython_EXECUTABLE={sys.executable}")
    run("cmake", "-S", ROOT, "-B", folder, "-G", "Ninja", *options)
    run("cmake", "--build", folder)
    return folder


@pytest.mark.slow
def test_all_of_the_extension(sanitizer, tmp_path):
    if shutil.which("cmake") is None or shutil.which("ninja") is None:
        pytest.skip("needs cmake and ninja")
    folder = build(sanitizer)
    run("ctest", "--test-dir", folder, "--output-on-failure")
    if sanitizer == "thread":  # Python, PyTorch and libgomp are built without it: it would see races that are none
        return
    (extension,) = (folder / "module").glob("_C*.so")
    # Both first: ASan looks for libstdc++'s throw when it starts, and Python has not loaded it by then.
    libraries = " ".join(
        subprocess.run([COMPILER, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    )
    folders = ("tests/ops", "tests/native", "tests/engine/test_programs.py")
    environment = {"LD_PRELOAD": libraries, "MSDD_FAST_TEST_EXTENSION": str(extension)}
    environment |= {
        name: f"{OPTIONS[name]}:log_path={tmp_path / 'report'}" for name in ("ASAN_OPTIONS", "UBSAN_OPTIONS")
    }
    # ASan keeps what was freed, so memory grows.
    chosen = ("-m", "not gpu and not slow", "-k", "not memory_does_not_grow", *folders)
    try:
        out = run(sys.executable, "-m", "pytest", "-q", "-x", *chosen, **environment)
    finally:
        print("\n".join(report.read_text() for report in tmp_path.glob("report*")))
    assert " passed" in out
