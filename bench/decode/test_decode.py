"""The whole decode and each of its scales, for every provider, as entries of pytest-benchmark.

msdd-nano at batch 1 (--batch-size), with --quick the tiny preset. One interleaved run (decode/suite.py) serves all
tests.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from msdd_fast.bench.decode.cases import DecodeCase
from msdd_fast.bench.decode.models import SHORT, load, resolutions_of
from msdd_fast.bench.decode.suite import measure_case
from msdd_fast.bench.ops import suite
from msdd_fast.bench.report.results import measurements
from msdd_fast.bench.timing.harness import Measurement
from msdd_fast.families import get_preset

PROVIDERS = ("eager-bf16", "eager-fp32", "compile-fp32", "compile-bf16", "engine-exact", "engine-fast")
STAGES = 4


@pytest.fixture(scope="session")
def decoded(request: pytest.FixtureRequest) -> dict[str, Any]:
    """The case, measured once."""
    option = request.config.getoption
    name = "tiny" if option("--quick") else "msdd-nano"
    device = torch.device(option("--device") or ("cuda" if torch.cuda.is_available() else "cpu"))
    compiled = not (option("--quick") or option("--no-compile"))
    seconds, limit = 0.2 if option("--quick") else 8.0, 300.0 if compiled else 0.0
    case = DecodeCase(name, option("--batch-size") or 1, seconds=seconds, compile_seconds=limit)
    rounds = 3 if option("--quick") else option("--rounds") or 100
    return {**measure_case(load(name, device), case, rounds), "device": device}


@pytest.mark.parametrize("part", ["whole", *(f"stage{s}" for s in range(STAGES))])
@pytest.mark.parametrize("name", PROVIDERS)
def test_decode(name: str, part: str, decoded: dict[str, Any], replay: Callable[..., None]) -> None:
    model, batch, device = decoded["case"]["model"], decoded["case"]["batch"], decoded["device"]
    config = get_preset(model)
    resolution = config.image_size if part == "whole" else resolutions_of(config)[int(part[-1])]
    key = "whole" if part == "whole" else str(resolution)
    providers = {p["provider"]: p for p in decoded["providers"]}
    if name not in providers:
        pytest.skip(decoded["missing"].get(name) or decoded["missing"].get(name.split("-")[0]) or "not of this device")
    mine = dict(measurements(providers[name]))[key]
    base: Measurement = dict(measurements(decoded["providers"][0]))[key]
    dtype = next(d for d in SHORT if str(d).endswith("." + providers[name]["dtype"]))
    case = suite.Case(resolution, dtype, batch, device)
    work = decoded["work"][key]
    shape = (batch, 3, resolution, resolution)
    info = suite.metrics(
        "decode" if part == "whole" else "scale", case, shape, mine, base, work["bytes"], work["flops"]
    )
    replay(mine.samples, info, f"{model} {part} batch {batch} {device}", {"part": part, "provider": name})
