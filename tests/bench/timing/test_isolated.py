"""A call in a process of its own: its result, its stages, and its end if it takes too long or dies."""

import contextlib
import os
from pathlib import Path

import pytest
import torch

from msdd_fast import Tokenizer
from msdd_fast.bench.decode.cases import DecodeCase
from msdd_fast.bench.decode.models import load
from msdd_fast.bench.decode.suite import compile_all, measure_case
from msdd_fast.bench.timing.isolated import IsolatedError, isolated

HERE = "tests.bench.timing.test_isolated:"


def doubled(value):
    def run(stage_done):
        stage_done()
        stage_done()
        return torch.full((2,), 2.0 * value, dtype=torch.bfloat16)

    print("what a library prints is no answer")
    return run


def endless():
    import time

    while True:
        time.sleep(1)


def broken():
    raise ValueError("no such thing")


def library(then):
    """Leaves something in Inductor's cache, and goes on as ``then`` says."""
    folder = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
    folder.mkdir(parents=True)
    (folder / "half.so").touch()
    return doubled(1) if then == "done" else broken()


def test_the_cache_of_a_compiler_that_was_not_done_is_removed(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with isolated(HERE + "library", {"then": "done"}, 600):
        pass
    assert len(list(tmp_path.rglob("half.so"))) == 1
    assert (tmp_path / "msdd-fast/inductor").stat().st_mode & 0o777 == 0o700  # nobody else's code is run
    with pytest.raises(IsolatedError, match="died: ValueError"):
        with isolated(HERE + "library", {"then": "died"}, 600):
            pass
    assert len(list(tmp_path.rglob("half.so"))) == 1


def test_result_and_stages():
    with isolated(HERE + "doubled", {"value": 3}, 600) as call:
        assert call.result.tolist() == [6.0, 6.0] and call.first_s > 0
        assert len(call.stage_seconds()) == 3 and min(call.stage_seconds()) >= 0
        assert len(call.stage_seconds(staged=False)) == 1
        process = call.process
    assert process.returncode is not None


def test_what_takes_too_long_is_ended():
    with pytest.raises(IsolatedError, match=r"^did not end in 0.1 s$"):
        with isolated(HERE + "endless", {}, 0.1):
            pass


def test_what_dies_says_why():
    with pytest.raises(IsolatedError, match="died: ValueError: no such thing"):
        with isolated(HERE + "broken", {}, 600):
            pass
    with pytest.raises(IsolatedError, match="died"):
        with isolated(HERE + "doubled", {"value": 1}, 600) as call:
            os.kill(call.process.pid, 9)
            call.stage_seconds()


def test_a_compiler_that_is_too_slow_is_reported_in_the_table():
    result = measure_case(Tokenizer.from_config("tiny"), DecodeCase("tiny", seconds=0, compile_seconds=0.01))
    assert result["missing"]["compile-fp32"] == "torch.compile did not end in 0.01 s"
    assert "engine-exact" in [p["provider"] for p in result["providers"]]


def test_several_compilers_at_once():
    """Each with its own limit; the result of one does not wait for that of another."""
    cases = [DecodeCase("tiny", compile_seconds=limit) for limit in (0.0, 0.01, 0.02)]
    with contextlib.ExitStack() as stack:
        compiled = compile_all(stack, cases, torch.device("cpu"))
    endings = ("left out", "torch.compile did not end in 0.01 s", "torch.compile did not end in 0.02 s")
    assert compiled == [(None, why) for why in endings]


@pytest.mark.slow
def test_compiled_decodes_are_checked_and_have_scales():
    tokenizer = load("tiny", torch.device("cpu"))  # as the process that compiles does
    result = measure_case(tokenizer, DecodeCase("tiny", seconds=0, compile_seconds=600))
    row = next(p for p in result["providers"] if p["provider"] == "compile-fp32")
    assert row["max_error"] < 1e-3 and len(row["samples"]) == 3 and row["first_call_s"] > max(row["samples"])
    for i, whole in enumerate(row["samples"]):
        assert len(row["scales"]) == 4 and sum(s[i] for s in row["scales"].values()) <= whole
