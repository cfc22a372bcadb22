"""The other decoders: their sizes and FLOP are those of SPEC section C; the table."""

import pytest
import torch

from msdd_fast.bench import peers
from msdd_fast.errors import InputError

CPU = torch.device("cpu")
# Decoder parameters in millions, GFLOP of one 256x256 image.
SPEC_C = {"SD-VAE f8d4": (49.5, 622), "DC-AE f32c32": (200.2, 692), "TAESD": (1.22, 35.3), "RAE ViT-XL": (415, 222)}
SLOW_SPEC_C = {"DC-AE f64c128": (412, 699), "consistency decoder": (621, 2 * 8408)}


@pytest.mark.parametrize("name", SPEC_C)
def test_sizes_of_spec_c(name):
    _check(name, *SPEC_C[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW_SPEC_C)
def test_large_sizes_of_spec_c(name):
    _check(name, *SLOW_SPEC_C[name])


def test_one_first_call_is_enough_for_a_slow_decoder():
    calls = []
    slow = peers.time_it(lambda: calls.append(0), rounds=5, seconds=-1.0)
    assert len(calls) == 1 and slow["samples"] == [] and slow["median_s"] == slow["first_s"]
    quick = peers.time_it(lambda: calls.append(0), rounds=5, seconds=100.0)
    assert len(calls) == 7 and len(quick["samples"]) == 5


@pytest.mark.slow
def test_the_consistency_decoder_runs():
    """Two evaluations; small latents, since the network is the same at every size."""
    pytest.importorskip("diffusers", reason="pip install 'msdd-fast[peers]'")
    model, _ = peers.build(next(p for p in peers.PEERS if p.name == "consistency decoder"), CPU, torch.float32, 1)
    with torch.no_grad():
        image = model.decode(torch.randn(1, 4, 4, 4)).sample
    assert image.shape == (1, 3, 32, 32) and image.isfinite().all()


def _check(name, millions, gflop):
    pytest.importorskip("diffusers", reason="pip install 'msdd-fast[peers]'")
    facts = peers.facts(next(p for p in peers.PEERS if p.name == name))
    assert facts["parameters"] / 1e6 == pytest.approx(millions, rel=0.01)
    assert facts["flops"] / 1e9 == pytest.approx(gflop, rel=0.01)


def test_the_table():
    rows = [
        {"name": "a", "parameters": 2_000_000, "flops": 3 * 10**9, "eager": {"median_s": 0.5}},
        {"name": "b", "parameters": 10**6, "flops": 10**9, "eager": {"median_s": 0.1}, "engine": {"median_s": 0.05}},
    ]
    rows[0]["compile"] = {"missing": "torch.compile did not end in 1 s"}
    rows[1]["eager"]["samples"] = []
    lines = [line.split() for line in peers.table(rows, batch=2)]
    assert lines[1] == ["a", "2.0", "3", "4.00", "-", "[1]", "-"]
    assert lines[2] == ["b", "1.0", "1", "20.0", "[2]", "-", "40.0"]
    assert " ".join(lines[3]) == "[1] torch.compile did not end in 1 s" and " ".join(lines[4]) == "[2] its first call"
    assert set(SPEC_C) | set(SLOW_SPEC_C) == {p.name for p in peers.PEERS}
    with pytest.raises(InputError, match="--only must name some of SD-VAE"):
        peers.main(["--only", "nothing"])
