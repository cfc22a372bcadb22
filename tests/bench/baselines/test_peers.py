"""The other decoders: their sizes and FLOP; the table."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

from msdd_fast.bench.baselines import peers, turns
from msdd_fast.bench.baselines.peer import build, size_of
from msdd_fast.bench.baselines.turns import Options, in_turns
from msdd_fast.bench.timing.harness import WrongResultError
from msdd_fast.bench.timing.isolated import IsolatedError
from msdd_fast.errors import InputError

CPU = torch.device("cpu")
# Decoder parameters in millions, GFLOP of one 256x256 image.
EXPECTED = {"SD-VAE f8d4": (49.5, 622), "DC-AE f32c32": (200.2, 692), "TAESD": (1.22, 35.3), "RAE ViT-XL": (415, 222)}
SLOW_EXPECTED = {"DC-AE f64c128": (412, 699), "consistency decoder": (621, 2 * 8408)}


@pytest.mark.parametrize("name", EXPECTED)
def test_sizes_of_spec_c(name):
    _check(name, *EXPECTED[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW_EXPECTED)
def test_large_sizes_of_spec_c(name):
    _check(name, *SLOW_EXPECTED[name])


def ways(order, **results):
    def run(name):
        order.append(name)
        return results[name]

    return {name: lambda name=name: run(name) for name in results}


def test_the_ways_take_turns():
    """After a first call of each; a slow decoder has one more."""
    order = []
    calls = ways(order, eager=torch.ones(2), engine=torch.tensor([1.0, 1.25]))
    timed = in_turns("a", calls, Options(CPU, torch.float32, rounds=3, compile_seconds=0))
    assert " ".join(order) == "eager engine" + " eager engine" + " engine eager" + " eager engine"
    assert timed["compile"] == {"missing": "left out"}
    assert timed["eager"]["max_error"] == 0 and timed["engine"]["max_error"] == 0.25
    assert len(timed["engine"]["samples"]) == 3 and timed["engine"]["median_s"] < 1
    order.clear()
    in_turns("a", calls, Options(CPU, torch.float32, seconds=0, compile_seconds=0))
    assert len(order) == 4


def test_the_compiled_one_takes_turns_too(monkeypatch):
    compiled = SimpleNamespace(first_s=60.0, result=torch.ones(2), stage_seconds=lambda: [1.0, 2.0])
    monkeypatch.setattr(turns, "isolated", lambda *_: contextlib.nullcontext(compiled))
    options = Options(CPU, torch.float32, rounds=2)
    timed = in_turns("a", ways([], eager=torch.ones(2)), options)
    assert timed["compile"] == {"median_s": 3.0, "samples": (3.0, 3.0), "first_s": 60.0, "max_error": 0}
    compiled.result = torch.ones(3)
    with pytest.raises(WrongResultError, match=r"compile must give finite numbers of the shape \(2,\)"):
        in_turns("a", ways([], eager=torch.ones(2)), options)

    def too_slow(*_):
        raise IsolatedError("did not end in 60 s")

    monkeypatch.setattr(turns, "isolated", too_slow)
    timed = in_turns("a", ways([], eager=torch.ones(2)), options)
    assert timed["compile"] == {"missing": "torch.compile did not end in 60 s"}


@pytest.mark.slow
def test_the_consistency_decoder_runs():
    """Two evaluations; small latents, since the network is the same at every size."""
    pytest.importorskip("diffusers", reason="pip install 'msdd-fast[peers]'")
    model, _ = build(next(p for p in peers.PEERS if p.name == "consistency decoder"), CPU, torch.float32, 1)
    with torch.no_grad():
        image = model.decode(torch.randn(1, 4, 4, 4)).sample
    assert image.shape == (1, 3, 32, 32) and image.isfinite().all()


def _check(name, millions, gflop):
    pytest.importorskip("diffusers", reason="pip install 'msdd-fast[peers]'")
    size = size_of(next(p for p in peers.PEERS if p.name == name))
    assert size["parameters"] / 1e6 == pytest.approx(millions, rel=0.01)
    assert size["flops"] / 1e9 == pytest.approx(gflop, rel=0.01)


def test_the_table():
    rows = [
        {"name": "a", "parameters": 2_000_000, "flops": 3 * 10**9, "eager": {"median_s": 0.5}},
        {"name": "b", "parameters": 10**6, "flops": 10**9, "eager": {"median_s": 0.1}, "engine": {"median_s": 0.05}},
    ]
    rows[0]["compile"] = {"missing": "torch.compile did not end in 1 s"}
    rows[1]["engine"]["note"] = "by block"
    lines = [line.split() for line in peers.table(rows, batch=2)]
    assert lines[1] == ["a", "2.0", "3", "4.00", "-", "[1]", "-"]
    assert lines[2] == ["b", "1.0", "1", "20.0", "-", "40.0", "[2]"]
    assert " ".join(lines[3]) == "[1] torch.compile did not end in 1 s" and " ".join(lines[4]) == "[2] by block"
    assert set(EXPECTED) | set(SLOW_EXPECTED) == {p.name for p in peers.PEERS}
    with pytest.raises(InputError, match="--only must name some of SD-VAE"):
        peers.main(["--only", "nothing"])
