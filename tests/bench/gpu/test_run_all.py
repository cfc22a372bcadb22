"""bench/gpu/run_all.sh where there is no GPU: what needs one is skipped, a failure is recorded and stops nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def run_all(out, *parts, budget=None, **environment):
    options = [] if budget is None else ["--budget", str(budget)]
    command = [str(ROOT / "bench/gpu/run_all.sh"), *options, str(out), *parts]
    environment = {**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", **environment}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_benchmarks_and_skipped_parts(tmp_path):
    done = run_all(
        tmp_path, "tests", "sanitize", "bench", "training", "ncu", BENCH="bench/ops/test_euler_step.py --quick"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    summary = (tmp_path / "summary.md").read_text()
    for line in (
        "| tests | skipped: no GPU | 0 |",
        "| memcheck | skipped: no GPU | 0 |",
        "| ncu | skipped: no GPU | 0 |",
        "| training-msdd-d12 | skipped: no GPU | 0 |",
        "| bench | passed |",
    ):
        assert line in summary
    assert "| euler_step | 32 | float32 | 2 | plain |" in summary and "Ceilings measured in this run: copy" in summary
    assert json.loads((tmp_path / "bench.json").read_text())["benchmarks"]
    assert "passed" in (tmp_path / "bench.log").read_text()


def test_a_failure_is_recorded_and_the_next_part_runs(tmp_path):
    done = run_all(tmp_path, "suite", "bench", TESTS="tests/missing.py", BENCH="bench --version")
    assert done.returncode == 1
    summary = (tmp_path / "summary.md").read_text()
    assert "| suite | failed (exit 4) |" in summary and "| bench | passed |" in summary
    stopped = run_all(tmp_path, "bench", LIMIT="0.01")
    assert stopped.returncode == 1 and "| bench | stopped after 0.01 s |" in (tmp_path / "summary.md").read_text()


def test_usage(tmp_path):
    done = run_all(tmp_path, "tset")
    assert (
        done.returncode == 2
        and "unknown part tset; usage: run_all.sh [--budget SECONDS] OUT [build tests" in done.stderr
    )
    assert run_all(tmp_path, "bench", budget="soon").returncode == 2


def test_parts_beyond_the_budget_are_skipped(tmp_path):
    done = run_all(tmp_path, "bench", "suite", budget=1)  # importing torch alone takes as long
    summary = (tmp_path / "summary.md").read_text()
    assert "| suite | skipped: the budget of 1 s is used up | 0 |" in summary
    assert done.returncode in (0, 1)
