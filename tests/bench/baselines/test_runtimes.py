"""Other runtimes beside the engine: what is checked, and what is missing without their packages."""

import importlib.util

import pytest
import torch

from msdd_fast import Tokenizer
from msdd_fast.bench.baselines import runtimes
from msdd_fast.bench.timing.harness import WrongResultError
from msdd_fast.errors import BackendUnavailableError

HAS = {name: importlib.util.find_spec(name) is not None for name in ("openvino", "onnxruntime", "onnxscript")}


def tiny():
    torch.manual_seed(0)
    return Tokenizer.from_config("tiny")


def test_networks_are_those_of_the_sampler(monkeypatch):
    """Each is asked at the time at which the sampler asks the decoder."""
    tok, z = tiny(), torch.randn(2, 16, 32)
    asked = []
    original = type(tok.decoder).forward
    monkeypatch.setattr(
        type(tok.decoder),
        "forward",
        lambda self, x, t, z: asked.append((x.shape, t.tolist())) or original(self, x, t, z),
    )
    tok.decode(z)
    usual, asked[:] = list(asked), []
    with torch.no_grad():
        for module, inputs in runtimes.networks(tok, z):
            module(*inputs)
    assert asked == usual and len(usual) == tok.config.schedule.num_stages


def test_a_wrong_network_is_not_timed():
    check = runtimes.checker([torch.zeros(2)])
    assert check("engine-fp32", torch.zeros(1)) is None
    assert check("openvino-fp32", [torch.full((2,), 1e-4)]) == pytest.approx(1e-4)
    assert check("openvino-bf16", [torch.full((2,), 0.1)]) == pytest.approx(0.1)
    for wrong in (0.1, float("nan")):
        with pytest.raises(WrongResultError, match="openvino-fp32: velocities differ by"):
            check("openvino-fp32", [torch.full((2,), wrong)])


@pytest.mark.skipif(HAS["openvino"] and HAS["onnxruntime"], reason="both are installed")
def test_what_is_missing_is_named():
    module, inputs = runtimes.networks(tiny(), torch.randn(1, 16, 32))[0]
    if not HAS["openvino"]:
        with pytest.raises(BackendUnavailableError, match=r"OpenVINO is missing: pip install 'msdd-fast\[runtimes\]'"):
            runtimes.openvino(module, inputs, torch.float32)
    if not (HAS["onnxruntime"] and HAS["onnxscript"]):
        with pytest.raises(BackendUnavailableError, match="ONNX Runtime is missing"):
            runtimes.onnx_runtime(module, inputs)


@pytest.mark.slow
@pytest.mark.skipif(not all(HAS.values()), reason="pip install 'msdd-fast[runtimes]'")
def test_every_runtime_gives_the_velocities(capsys, tmp_path):
    runtimes.main(["tiny", "--rounds", "3", "--json", str(tmp_path / "out.json")])
    text = capsys.readouterr().out
    assert all(name in text for name in ("openvino-fp32", "openvino-bf16", "onnxruntime-fp32", "engine-fp32"))
