"""FLOP of a training step against torch's counter, and the benchmark and its estimate."""

import json
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from msdd_fast import Tokenizer
from msdd_fast.backends import use_backend
from msdd_fast.bench.training import main, stage1_flops, stage2_flops
from msdd_fast.families.msdd.presets import PRESETS
from msdd_fast.training.loop.draws import Draws
from msdd_fast.training.recipes.msdd_one_step import OneStepConfig
from msdd_fast.training.recipes.msdd_stage1 import Stage1Config, Stage1Recipe, stage1_loss
from msdd_fast.training.recipes.msdd_stage2 import Stage2Config, Stage2Recipe, make_student

JOINT = replace(PRESETS["tiny"], decoder=replace(PRESETS["tiny"].decoder, conditioning="joint"))


def counted(loss):
    with FlopCounterMode(display=False) as counter, use_backend("sdpa"), sdpa_kernel(SDPBackend.MATH):
        loss()[0].backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("config", [PRESETS["tiny"], JOINT], ids=["cross", "joint"])
def test_flops_of_a_step(config):
    """A backward pass is two forward passes but for the gradients of images and times, which are not needed."""
    draws, images = Draws(0, 0, torch.arange(4)), torch.zeros(4, 3, 64, 64)
    tokenizer, objective = Tokenizer(config), Stage1Config(stages_per_image=2)
    flops = counted(lambda: stage1_loss(tokenizer, images, objective, draws))
    assert flops == pytest.approx(4 * stage1_flops(config, objective), rel=0.05)
    decodes = Stage1Recipe(objective, None, OneStepConfig(share=1.0))
    flops = counted(lambda: decodes.loss(tokenizer, images, draws))
    assert flops == pytest.approx(4 * stage1_flops(config, objective, one_step_share=1.0), rel=0.05)
    half = stage1_flops(config, objective) + stage1_flops(config, objective, one_step_share=1.0)
    assert stage1_flops(config, objective, one_step_share=0.5) == pytest.approx(half / 2)
    matching = Stage2Config("teacher-matching", teacher_steps=2, teacher_cfg_scale=1.5, perceptual_weight=0)
    recipe, student = Stage2Recipe(matching, tokenizer), make_student(tokenizer)
    flops = counted(lambda: recipe.loss(student, images, draws))
    assert flops == pytest.approx(4 * stage2_flops(config, matching), rel=0.05)


def test_a_restarted_teacher_costs_less():
    config = PRESETS["tiny"]
    full = stage2_flops(config, Stage2Config())
    none = stage2_flops(config, Stage2Config(reconstruction_weight=0))
    assert 0 < full - none < (none - stage1_flops(config, Stage1Config()) / 6)


def test_measure_and_estimate(tmp_path, capsys):
    file = tmp_path / "m.json"
    options = ["--preset", "tiny", "--batch-size", "1", "2", "--steps", "1", "--device", "cpu", "--json", str(file)]
    assert main(["measure", *options]) == 0
    rows = json.loads(file.read_text())["rows"]
    assert [row["batch"] for row in rows] == [1, 2] and all(0 < row["fraction"] < 1.5 for row in rows)
    capsys.readouterr()
    assert main(["estimate", "stage1-cross-4scale", "--measured", str(file), "--gpus", "8"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("ESTIMATE for 8 x CPU, from tiny") and "256.2 M images" in out and " h at " in out
    assert main(["estimate", "stage2-joint-3scale", "--measured", str(file)]) == 1
    assert "--preset must name the model of a stage-2 configuration, got none" in capsys.readouterr().err
    assert main(["estimate", "stage2-joint-3scale", "--measured", str(file), "--preset", "msdd-d12-joint-3scale"]) == 0
    assert "not measured for this configuration" in capsys.readouterr().out


def test_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["measure"]) == 1
    assert "training throughput is measured on a GPU, and none is here" in capsys.readouterr().err
