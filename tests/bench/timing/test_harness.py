"""The measuring harness: order, refusal of wrong results, statistics; and the benchmarks themselves, run quickly."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from msdd_fast import ops
from msdd_fast.bench.ops.suite import DTYPES, in_float32, op_providers
from msdd_fast.bench.report.op_table import markdown
from msdd_fast.bench.timing import harness
from msdd_fast.bench.timing.ceilings import copy_bandwidth, floor_seconds, gemm_rate, last_level_cache
from msdd_fast.bench.timing.clock import CpuTimer
from msdd_fast.bench.timing.harness import Measurement, Provider, WrongResultError, close_to, compare, same_moments
from msdd_fast.errors import InputError

ROOT = Path(__file__).resolve().parents[3]
CPU = torch.device("cpu")
ONES = torch.ones(4)


class FakeTimer:
    """Takes 1, 2, 3, ... seconds and writes down whom it times."""

    def __init__(self):
        self.order = []

    def calls(self, function):
        return 1

    def seconds(self, function, calls):
        self.order.append(function.__name__)
        return float(len(self.order))


def providers(*names):
    def make(name):
        def function():
            return ONES

        function.__name__ = name
        return Provider(name, function)

    return [make(n) for n in names]


def test_providers_take_turns():
    timer = FakeTimer()
    result = compare(providers("a", "b", "c"), close_to(ONES), timer, rounds=4)
    assert "".join(timer.order) == "abc" + "bca" + "cab" + "abc"
    assert result["a"].samples == (1, 6, 8, 10) and list(result) == ["a", "b", "c"]


def test_a_slow_provider_gets_fewer_rounds_and_a_clock_of_its_own_counts(monkeypatch):
    clock = SimpleNamespace(time=0.0)
    monkeypatch.setattr(harness.time, "perf_counter", lambda: clock.time)

    def takes(name, seconds):
        def one_call():
            clock.time += seconds
            return 7.0 + seconds

        return Provider(name, lambda: ONES, clock=one_call)

    result = compare([takes("slow", 10.0), takes("quick", 1.0)], close_to(ONES), FakeTimer(), 100, 0, 4.0, min_rounds=2)
    assert result["slow"].samples == (17.0, 17.0) and result["quick"].samples == (8.0,) * 4
    result = compare([takes("slow", 10.0)], close_to(ONES), FakeTimer(), 100, 0, seconds=0)
    assert len(result["slow"].samples) == harness.MIN_ROUNDS and result["slow"].first_s is not None


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (ONES + 0.1, "bad is off by 0.1, more than 2.95e-06"),
        (ONES * float("nan"), "bad is off by nan"),
        (ONES[:3], r"bad must give tensors of the shapes \[\(4,\)\], got \[\(3,\)\]"),
    ],
)
def test_a_wrong_provider_is_refused_before_any_timing(wrong, message):
    timer = FakeTimer()
    with pytest.raises(WrongResultError, match=message):
        compare([*providers("good"), Provider("bad", lambda: wrong)], close_to(ONES), timer)
    assert timer.order == []


def test_tolerance_and_errors():
    check = close_to((ONES, 8 * ONES))
    assert check("exact", (ONES, 8 * ONES)) == 0
    assert check("rounded", (ONES, (8 * ONES).bfloat16() + 0.0625)) == pytest.approx(
        0.0625
    )  # one unit of bfloat16 at 8
    with pytest.raises(WrongResultError):
        check("float32", (ONES, 8 * ONES + 0.0625))
    assert close_to(ONES, 0.5)("loose", ONES + 0.25) == 0.25


def test_moments():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(10_000, generator=generator) for _ in range(2))
    assert same_moments(a)("other numbers", b) is None
    with pytest.raises(WrongResultError, match="wide has the deviation"):
        same_moments(a)("wide", 1.2 * b)
    with pytest.raises(WrongResultError, match="shifted has the mean"):
        same_moments(a)("shifted", b + 0.2)


def test_statistics():
    m = Measurement("m", (5.0, 1.0, 4.0, 2.0, 3.0), None)
    assert (m.median, m.quantile(0.1), m.quantile(0.9)) == (3.0, pytest.approx(1.4), pytest.approx(4.6))
    assert m.speedup(Measurement("slow", (6.0, 7.0, 5.0), None)) == 2.0


def test_a_planted_slow_provider_is_slower():
    def slow():
        time.sleep(2e-3)
        return ONES

    result = compare([Provider("slow", slow), *providers("fast")], close_to(ONES), CpuTimer(1e-3), rounds=5)
    assert result["slow"].median >= 2e-3
    assert result["fast"].speedup(result["slow"]) > 10


def test_bad_input():
    for names in ((), ("a", "a")):
        with pytest.raises(InputError, match="providers must have one name each, got"):
            compare(providers(*names), close_to(ONES), FakeTimer())
    with pytest.raises(InputError, match="rounds must be at least 1, got 0"):
        compare(providers("a"), close_to(ONES), FakeTimer(), rounds=0)


def test_ceilings(monkeypatch):
    assert last_level_cache(CPU) >= 2**18
    monkeypatch.setattr("msdd_fast.bench.timing.ceilings.last_level_cache", lambda _: 2**20)
    copy_bandwidth.cache_clear()
    copy = copy_bandwidth(CPU)
    assert 1e8 < copy < 1e13 and copy_bandwidth(CPU) == copy
    gemm = gemm_rate(CPU, torch.float32)
    assert floor_seconds(CPU, torch.float32, 1000) == 1000 / copy
    assert floor_seconds(CPU, torch.float32, 1, 10**12) == 10**12 / gemm
    copy_bandwidth.cache_clear()


def test_what_cannot_run_has_its_reason(monkeypatch):
    monkeypatch.setattr("msdd_fast.backends.packages._find_module", lambda name: False)
    monkeypatch.setattr(torch, "compile", lambda *_, **__: lambda *_: 1 / 0)
    x = torch.ones(2, 2)
    plain = {"plain": lambda x, v, dt: x + v * dt}
    found = op_providers(ops.euler_step, (x, x, 0.5), plain, ["triton"])
    assert [p.name for p in found.usable] == ["plain"] and torch.equal(found.usable[0].function(), 1.5 * x)
    assert found.missing["compile"] == "torch.compile failed: ZeroDivisionError: division by zero"
    assert "triton: Triton is not installed" in found.missing["triton"]


def test_in_float32():
    half, seeds = ONES.half(), torch.arange(2)
    x, s, dtype, shape = in_float32((half, seeds, torch.bfloat16, (1, 2)))
    assert x.dtype == torch.float32 and s is seeds and dtype == torch.float32 and shape == (1, 2)


@pytest.mark.parametrize("dtypes", ["fp32,bf16", pytest.param("fp16", marks=pytest.mark.slow)])
def test_every_benchmark_runs(dtypes, tmp_path):
    """The quick mode over all files: one JSON entry for every provider that can run here, with all its fields."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    command = [
        "-m",
        "pytest",
        "bench",
        "-q",
        "-p",
        "no:cacheprovider",
        "--quick",
        f"--dtypes={dtypes}",
        f"--benchmark-json={tmp_path}/b.json",
    ]
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads((tmp_path / "b.json").read_text())
    assert document["machine_info"]["msdd_fast"]["cpu"]["cores"] >= 1
    names = {str(DTYPES[name]).removeprefix("torch.") for name in dtypes.split(",")}
    assert names <= set(document["ceilings"]) - {"copy"} <= names | {"float32", "bfloat16"}  # those of the decode, too
    assert {b["extra_info"]["op"] for b in document["benchmarks"]} == {*ops.__all__, "decode", "scale"}
    whole = [b["extra_info"] for b in document["benchmarks"] if b["extra_info"]["op"] == "decode"]
    assert {i["backend"] for i in whole} >= {"eager-bf16", "engine-exact"} and whole[0]["teraflops"] > 0
    assert {b["extra_info"]["scale"] for b in document["benchmarks"] if b["extra_info"]["op"] == "scale"} == {
        8,
        16,
        32,
        64,
    }
    for entry in (b for b in document["benchmarks"] if b["extra_info"]["op"] in ops.__all__):
        info, stats = entry["extra_info"], entry["stats"]
        assert stats["rounds"] == 3 and stats["median"] * 1e6 == pytest.approx(info["median_us"])
        assert info["images_per_second"] == pytest.approx(info["batch"] / stats["median"])
        assert info["fraction_of_copy"] == pytest.approx(
            info["gigabytes_per_second"] * 1e9 / document["ceilings"]["copy"]
        )
        assert info["speedup"] == 1 or info["backend"] != info["baseline"]
        assert info["scale"] == 32 and info["shape"] and info["dtype"] in document["ceilings"]
        assert info["max_error"] is None or info["max_error"] < 0.1
    assert "euler_step" in done.stdout and "% of copy" in done.stdout
    assert len(markdown(document).splitlines()) == len(document["benchmarks"]) + 6
