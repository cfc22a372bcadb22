"""pytest-benchmark for the ops: ``python -m pytest bench [--quick]``.

A file bench/ops/test_<op>.py states ``BASELINES``, makes inputs and calls ``measure``. Its test is parametrised by case
(scale, dtype) and provider. The first provider of a case times all of them in turns (harness.compare); pytest-benchmark
then gets the samples of each, through a clock that a sample moves on.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch

from msdd_fast.bench.ops import suite
from msdd_fast.bench.report.op_table import text_table
from msdd_fast.bench.report.text import ceilings_line
from msdd_fast.bench.timing import clock as timing
from msdd_fast.bench.timing import machine
from msdd_fast.bench.timing.ceilings import copy_bandwidth, gemm_rate
from msdd_fast.bench.timing.harness import Check, Measurement, close_to, compare

BATCH = {"cpu": 8, "cuda": 512}
QUICK = {"scales": "32", "batch-size": 2, "rounds": 3}
FULL = {"scales": ",".join(map(str, suite.SCALES)), "batch-size": None, "rounds": 20}

os.environ.pop("TRITON_INTERPRET", None)  # the interpreter's times mean nothing


class SampleClock:
    """A clock that only ``advance`` moves: pytest-benchmark reads one sample around each "call"."""

    def __init__(self) -> None:
        self.time = 0.0

    def now(self) -> float:
        return self.time

    def rewind(self) -> None:
        """Back to zero: differences of large times would round the sample."""
        self.time = 0.0

    def advance(self, seconds: float) -> None:
        self.time += seconds


CLOCK = SampleClock()
INFOS = pytest.StashKey[list[dict[str, Any]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("msdd-fast")
    group.addoption("--quick", action="store_true", help="32 px, batch 2, 3 rounds, no torch.compile: does it run?")
    group.addoption("--scales", help="comma-separated, default 32,64,128,256")
    group.addoption("--dtypes", default="fp32,bf16,fp16", help="comma-separated, default fp32,bf16,fp16")
    group.addoption("--batch-size", type=int, help="default 8 on a CPU, 512 on a GPU")
    group.addoption("--rounds", type=int, help="samples for each provider, default 20")
    group.addoption("--no-compile", action="store_true", help="leave torch.compile out")
    group.addoption("--device", help="default cuda if there is one, else cpu")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[INFOS] = []
    config.option.benchmark_quiet = True  # our table replaces its own


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "provider" not in metafunc.fixturenames:
        return
    module = metafunc.module
    dtypes = [suite.DTYPES[name] for name in _option(metafunc.config, "dtypes").split(",")]
    device = _device(metafunc.config)
    batch = _option(metafunc.config, "batch-size") or {**BATCH, **getattr(module, "BATCH", {})}[device.type]
    scales = [int(s) for s in _option(metafunc.config, "scales").split(",")]
    cases = [suite.Case(s, d, batch, device) for s in scales for d in dtypes]
    metafunc.parametrize("case", cases, ids=str)
    backends = _op(module).implementations
    metafunc.parametrize("provider", [*module.BASELINES, "compile", *backends])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        clock = CLOCK.now if "replay" in getattr(item, "fixturenames", ()) else timing.now
        item.add_marker(pytest.mark.benchmark(timer=clock))


class Compared(NamedTuple):
    """Results of a case, kept between the tests of its providers."""

    measurements: dict[str, Measurement]
    missing: dict[str, str]
    shape: torch.Size


@pytest.fixture(scope="session")
def compared() -> dict[Any, Compared]:
    """The cases measured so far."""
    return {}


@pytest.fixture
def replay(request: pytest.FixtureRequest, benchmark: Any) -> Callable[..., None]:
    """``replay(samples, extra_info, group, params)``: pass measured samples to pytest-benchmark."""

    def run(samples: Sequence[float], info: dict[str, Any], group: str, params: dict[str, Any]) -> None:
        benchmark.group, benchmark.params = group, params
        benchmark.extra_info.update(info)
        request.config.stash[INFOS].append(info)
        waiting = iter(samples)
        benchmark.pedantic(lambda: CLOCK.advance(next(waiting)), setup=CLOCK.rewind, rounds=len(samples))

    return run


@pytest.fixture
def measure(
    request: pytest.FixtureRequest,
    replay: Callable[..., None],
    case: suite.Case,
    provider: str,
    compared: dict[Any, Compared],
) -> Callable[..., None]:
    """``measure(op, inputs, bytes_moved, flops=0, tolerance=None, check=None)``: time this test's provider.

    ``op(*inputs, backend=...)`` and ``baseline(*inputs)`` are checked against the op's eager backend on float32 inputs,
    within ``tolerance``. For providers that need another check, ``check`` maps their names to a function from the
    reference to a Check ("compile" follows the first baseline).
    """
    config, module = request.config, request.module
    name, baseline = _op(module).name, next(iter(module.BASELINES))
    torch.manual_seed(0)

    def run(
        op: Callable[..., Any],
        inputs: tuple[Any, ...],
        bytes_moved: int,
        flops: int = 0,
        tolerance: float | None = None,
        check: dict[str, Callable[[torch.Tensor], Check]] | None = None,
    ) -> None:
        def compare_all() -> Compared:
            quick = config.getoption("--quick")
            leave_out = "left out (--quick, --no-compile)" if quick or config.getoption("--no-compile") else None
            found = suite.op_providers(op, inputs, module.BASELINES, list(_op(module).implementations), leave_out)
            with torch.no_grad():
                reference = op(*suite.in_float32(inputs), backend="eager")
            shape = (reference if isinstance(reference, torch.Tensor) else reference[0]).shape
            usual = close_to(reference, tolerance)
            checks = {n: make(reference) for n, make in (check or {}).items()}
            if baseline in checks:
                checks.setdefault("compile", checks[baseline])
            timer = timing.timer_for(case.device, 0.0 if quick else timing.CPU_SAMPLE_S)
            rounds = _option(config, "rounds")
            results = compare(found.usable, lambda n, out: checks.get(n, usual)(n, out), timer, rounds)
            return Compared(results, found.missing, shape)

        key = (request.node.originalname, case)
        if key not in compared:
            compared[key] = compare_all()
        done = compared[key]
        if provider in done.missing:
            pytest.skip(done.missing[provider])
        measured = done.measurements[provider]
        info = suite.metrics(name, case, done.shape, measured, done.measurements[baseline], bytes_moved, flops)
        params = {"case": str(case), "batch": case.batch, "provider": provider}
        replay(measured.samples, info, f"{name} {case} batch {case.batch} {case.device}", params)

    return run


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    infos = config.stash[INFOS]
    if not infos:
        return
    device = _device(config)
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    terminalreporter.section(f"{device}{threads}; {ceilings_line({'copy': copy_bandwidth(device)})}")
    for line in text_table(infos):
        terminalreporter.write_line(line)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info["msdd_fast"] = machine.machine_info()


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    """The ceilings of this run: copy, and GEMM for every dtype that was measured."""
    device = _device(config)
    names = sorted({info["dtype"] for info in config.stash[INFOS]})
    gemm = {name: gemm_rate(device, getattr(torch, name)) for name in names}
    output_json["ceilings"] = {"copy": copy_bandwidth(device), **gemm}


def _op(module: Any) -> Any:
    """The op that bench/ops/test_<op>.py measures: msdd_fast.ops.<op>."""
    return importlib.import_module(f"msdd_fast.ops.{module.__name__.rpartition('.')[2].removeprefix('test_')}").OP


def _option(config: pytest.Config, name: str) -> Any:
    """The option, or its default with or without --quick."""
    given = config.getoption(f"--{name}")
    return given if given is not None else (QUICK if config.getoption("--quick") else FULL)[name]


def _device(config: pytest.Config) -> torch.device:
    return torch.device(config.getoption("--device") or ("cuda" if torch.cuda.is_available() else "cpu"))
