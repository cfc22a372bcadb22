"""Configuration files: those of the paper's two stages, those of the bundled models, and bad ones."""

import json

import pytest

from msdd_fast.checkpoint import ASSETS
from msdd_fast.errors import ConfigError
from msdd_fast.families import get_preset
from msdd_fast.training.command_line import parse_config
from msdd_fast.training.config import config_names, read_config
from msdd_fast.training.recipes.msdd_stage1 import MSDDTrainConfig
from msdd_fast.training.recipes.msdd_stage2 import MSDDDistillConfig

EPOCH = 1_281_167 // 1024
PAPER = [f"{c}-{n}scale" for c in ("cross", "joint") for n in (3, 4)]


def test_names():
    assert config_names() == [f"stage{stage}-{name}" for stage in (1, 2) for name in PAPER]


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_two_stages(name):
    one, two = read_config(MSDDTrainConfig, f"stage1-{name}"), read_config(MSDDDistillConfig, f"stage2-{name}")
    model = get_preset(one.preset)
    assert f"{model.decoder.conditioning}-{model.schedule.num_stages}scale" == name and model.decoder.depth == 12
    for config, epochs in ((one, 200), (two, 1)):
        loop = config.loop
        assert (loop.batch_size, loop.steps, loop.precision) == (1024, epochs * EPOCH, "bfloat16")
        assert 1024 % (8 * (loop.micro_batch or 1)) == 0 and config.crop == "adm"
        assert config.data is None and config.out is None  # the user's
    assert two.objective.recipe == "adversarial" and two.objective.teacher_steps == 1


@pytest.mark.parametrize(
    ("kind", "file"), [(MSDDTrainConfig, "msdd-nano-teacher/train.json"), (MSDDDistillConfig, "msdd-nano/distill.json")]
)
def test_the_bundled_models_configurations(kind, file):
    config = read_config(kind, str(ASSETS / file))
    data = json.loads((ASSETS / file).read_text())
    assert config.loop.steps == data["loop"]["steps"] and config.optim.betas == (0.9, 0.95)
    assert list(config.data) == data["data"] and config.min_crop == data["min_crop"]


def test_the_command_line_has_the_last_word():
    pytest.importorskip("tyro")
    given = ["--config", "stage1-joint-4scale", "--data", "a", "b.tar", "--out", "o", "--loop.batch-size", "64"]
    config = parse_config(MSDDTrainConfig, "msdd-fast train", "", given)
    assert (config.data, config.out, config.loop.batch_size) == (("a", "b.tar"), "o", 64)
    assert config.preset == "msdd-d12-joint" and config.optim.ema_decay == 0.9999 and config.loop.micro_batch == 32
    with pytest.raises(SystemExit):  # data and out have no default
        parse_config(MSDDTrainConfig, "msdd-fast train", "", given[:2])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "must hold a mapping, got list"),
        ("{", "is not JSON"),
        ('{"lop": {}}', "has unknown field 'lop'; known: cache, crop"),
        ('{"loop": {"steps": 1.5}}', r"loop\.steps must be of type int, got 1.5"),
        ('{"loop": {"strict": 1}}', r"loop\.strict must be of type bool, got 1"),
        ('{"optim": {"betas": [0.9]}}', r"optim\.betas must be a list of 2 values, got \[0.9\]"),
        ('{"optim": {"lr": NaN}}', r"optim\.lr must be finite, got nan"),
        ('{"data": "folder"}', r"data must be a list, got 'folder'"),
        ('{"val": 1}', r"val must be of type str, got 1"),
        ('{"crop": "left"}', "crop must be one of random, adm, center, got 'left'"),
        ('{"loop": {"guard": {"after": 0}}}', r"guard\.after must be at least 1, got 0"),
    ],
)
def test_bad_files(tmp_path, content, message):
    (tmp_path / "c.json").write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_config(MSDDTrainConfig, str(tmp_path / "c.json"))
    with pytest.raises(ConfigError, match="no configuration 'none': neither a readable file nor one of stage1-cross-3"):
        read_config(MSDDTrainConfig, "none")
