"""SSDD in the benchmarks: the waterfall's bars, a case of the suite, and what is refused."""

import pytest
import torch

from msdd_fast import Tokenizer
from msdd_fast.bench.decode import suite as decode
from msdd_fast.bench.decode import waterfall
from msdd_fast.bench.decode.cases import DecodeCase
from msdd_fast.bench.decode.models import load
from msdd_fast.errors import InputError


def test_the_waterfall():
    result = waterfall.measure(Tokenizer.from_config("tiny-ssdd"), 1, 1, with_compile=False, steps=1)
    rows = {r["provider"]: r for r in result["rows"]}
    assert {"eager-bf16", "hoist", "fused ops", "bare matmuls"} <= set(rows) and "attention" not in rows
    assert rows["fused ops"]["launches"] < rows["hoist"]["launches"] < rows["eager-bf16"]["launches"]
    assert rows["fused ops"]["max_error"] < 1e-4
    # The convolutions are in it: 3 x 3 of 16 channels at 64 x 64 alone are 19 MFLOP.
    assert result["matmul_flop"] > 300e6


@pytest.mark.parametrize("native", ["0", "1"])
def test_whoever_multiplies_the_products_are_counted(native, monkeypatch):
    """PyTorch, or the extension within a recorded program."""
    monkeypatch.setenv("MSDD_FAST_NATIVE_LINEAR", native)
    result = waterfall.measure(Tokenizer.from_config("tiny"), 1, 1, with_compile=False)
    rows = {r["provider"]: r for r in result["rows"]}
    assert result["matmul_flop"] > 10e6 and rows["bare matmuls"]["median_s"] > 1e-5


@pytest.mark.slow
def test_a_case_has_the_engine_and_its_one_scale():
    case = DecodeCase("tiny-ssdd", batch=2, seconds=0.0, compile_seconds=0)
    result = decode.measure_case(load("tiny-ssdd", torch.device("cpu")), case, rounds=1)
    providers = {p["provider"]: p for p in result["providers"]}
    assert providers["engine-exact"]["max_error"] < 1e-4 and list(providers["engine-exact"]["scales"]) == ["64"]
    assert "convolutions" in result["missing"]["engine-fast"]
    with pytest.raises(InputError, match="the work of an SSDD encode is not counted"):
        decode.measure_case(Tokenizer.from_config("tiny-ssdd"), DecodeCase("tiny-ssdd", kind="encode"))
