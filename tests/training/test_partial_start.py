"""Weights of one model as the start of another."""

import pytest
import torch
import torch.nn.functional as F

from msdd_fast.errors import ConfigError
from msdd_fast.training.partial_start import take_what_fits
from msdd_fast.training.recipes.msdd_stage1 import MSDDTrainConfig
from tests.perturbed import perturbed


def test_patch_embedding_sees_a_shrunk_patch():
    small, large = torch.nn.Conv2d(3, 8, 4, stride=4), torch.nn.Conv2d(3, 8, 8, stride=8)
    assert take_what_fits(large, small.state_dict()) == []
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(large(x), small(F.avg_pool2d(x, 2)), atol=1e-5, rtol=1e-5)


def test_what_does_not_fit_stays():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2), torch.nn.Conv2d(3, 8, 6))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    other = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 3), torch.nn.Conv2d(3, 8, 4))
    assert take_what_fits(model, other.state_dict()) == ["1.weight", "1.bias", "2.weight"]
    assert torch.equal(model[0].weight, other[0].weight) and torch.equal(model[2].bias, other[2].bias)
    assert all(torch.equal(before[name], model.state_dict()[name]) for name in ("1.weight", "1.bias", "2.weight"))
    assert take_what_fits(model, {}) == list(before)


def test_of_a_run(tmp_path):
    start = perturbed("tiny")
    start.save_pretrained(tmp_path / "start")
    changes = dict(data=(), out=str(tmp_path), preset="msdd-nano", image_size=64, partial_start=True)
    parts = MSDDTrainConfig(**changes, start=str(tmp_path / "start")).build()
    assert parts.tokenizer.config.decoder.hidden_size == 256
    assert parts.title.startswith("msdd-nano from ") and "decoder.final_layer.linear.weight" in parts.title
    same = MSDDTrainConfig(**changes | {"preset": "tiny"}, start=str(tmp_path / "start")).build()
    assert same.title.endswith("but for nothing")
    for name, tensor in same.tokenizer.state_dict().items():
        assert torch.equal(tensor, start.state_dict()[name])
    perturbed("tiny-ssdd").save_pretrained(tmp_path / "other")
    with pytest.raises(ConfigError, match="start has no tensor that fits the preset tiny, got"):
        MSDDTrainConfig(**changes | {"preset": "tiny"}, start=str(tmp_path / "other")).build()
    with pytest.raises(ConfigError, match="partial_start needs start"):
        MSDDTrainConfig(**changes).build()
