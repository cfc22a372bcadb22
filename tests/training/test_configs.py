"""Configuration files: those of the paper's two stages, those of the bundled models, and bad ones."""

import json

import pytest

from msdd_fast.checkpoint import ASSETS, bundled_names
from msdd_fast.commands.main import main
from msdd_fast.errors import ConfigError, InputError
from msdd_fast.families import get_preset
from msdd_fast.training.command_line import parse_config
from msdd_fast.training.config import config_names, read_config
from msdd_fast.training.loop.config import AdamConfig, LoopConfig, OptimConfig
from msdd_fast.training.loop.guard import GuardConfig
from msdd_fast.training.recipes.msdd_stage1 import MSDDTrainConfig, Stage1Config
from msdd_fast.training.recipes.msdd_stage2 import MSDDDistillConfig, Stage2Config
from msdd_fast.training.recipes.ssdd_objective import SSDDObjective

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


@pytest.mark.parametrize("name", bundled_names())
def test_the_bundled_models_configuration(name):
    file = ASSETS / name / "train.json"
    config = read_config(MSDDTrainConfig, str(file))
    data = json.loads(file.read_text())
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


NAN, INF = float("nan"), float("inf")
BAD_NUMBERS = [
    *((AdamConfig, name, NAN) for name in ("lr", "warmup_steps", "min_lr_ratio", "weight_decay", "grad_clip")),
    *((AdamConfig, name, -1) for name in ("lr", "warmup_steps", "min_lr_ratio", "weight_decay", "grad_clip")),
    *((AdamConfig, "betas", value) for value in ((0.9, 1.0), (-0.1, 0.9), (NAN, 0.9), (0.9,), 0.9)),
    *((AdamConfig, "lr", value) for value in (0, INF, 1e30, "1e-4", True)),
    *((AdamConfig, "min_lr_ratio", 1.5), (AdamConfig, "warmup_steps", 1.5), (AdamConfig, "grad_clip", INF)),
    *((OptimConfig, "ema_decay", value) for value in (-0.1, 1.1, NAN)),
    (OptimConfig, "lr", NAN),
    *((LoopConfig, name, -1) for name in ("log_every", "sample_every", "checkpoint_every", "workers", "seed")),
    *((LoopConfig, name, 0) for name in ("steps", "batch_size", "micro_batch", "keep")),
    *((LoopConfig, name, 10**30) for name in ("steps", "batch_size", "workers", "seed", "log_every", "keep")),
    *((LoopConfig, "steps", value) for value in (1.5, NAN, None, True)),
    *((GuardConfig, "spike_factor", value) for value in (NAN, INF, 0.5, -1)),
    *((GuardConfig, name, value) for name in ("after", "max_in_a_row") for value in (0, NAN)),
    *((Stage1Config, name, value) for name in ("start_fraction", "context_dropout") for value in (-0.1, 1.1, NAN)),
    *((Stage1Config, "perceptual_weight", value) for value in (-1, NAN, INF)),
    *((Stage1Config, "stages_per_image", value) for value in (0, 65, 1.5)),
    *((Stage2Config, f"{name}_weight", value) for name in ("image", "adversarial") for value in (-1, NAN, INF)),
    *((Stage2Config, "context_dropout", value) for value in (1, NAN)),
    *((Stage2Config, name, 0) for name in ("perceptual_crop", "teacher_steps")),
    *((Stage2Config, "teacher_cfg_scale", value) for value in (NAN, -1)),
    *((SSDDObjective, name, value) for name in ("kl_weight", "alignment_weight") for value in (-1, NAN, INF)),
    (SSDDObjective, "teacher_steps", 0),
]


@pytest.mark.parametrize(("kind", "name", "value"), BAD_NUMBERS)
def test_every_number_is_checked(kind, name, value):
    with pytest.raises((ConfigError, InputError), match=name.removeprefix("teacher_")):
        kind(**{name: value})


def test_zero_is_off():
    AdamConfig(warmup_steps=0, min_lr_ratio=0, weight_decay=0, grad_clip=0, betas=(0, 0))
    OptimConfig(ema_decay=0)
    LoopConfig(log_every=0, sample_every=0, checkpoint_every=0, workers=0, guard=GuardConfig(spike_factor=0))


@pytest.mark.parametrize("value", [0, 1.5, NAN])
def test_the_crop_of_a_run_is_checked_when_it_is_read(value):
    with pytest.raises(ConfigError, match=r"min_crop must be in \(0, 1\], got"):
        MSDDTrainConfig(("a",), "b", min_crop=value)


def test_numbers_of_the_command_line(capsys):
    """tyro's message about a wrong argument; no traceback."""
    pytest.importorskip("tyro")
    given = ["train", "--preset", "tiny", "--data", "x", "--out", "y"]
    for option, text in (("--optim.lr", "nan"), ("--loop.log-every", "-1"), ("--min-crop", "0")):
        with pytest.raises(SystemExit) as caught:
            main([*given, f"{option}={text}"])
        err = capsys.readouterr().err
        assert caught.value.code == 2 and "Traceback" not in err
        assert f"{option.split('.')[-1].strip('-').replace('-', '_')} must be " in err


def test_a_device_that_is_not_there(images, tmp_path, capsys):
    pytest.importorskip("tyro")
    for device in ("nonsense", "meta", "cuda:99"):
        given = ["train", "--preset=tiny", f"--data={images}", f"--out={tmp_path / 'out'}", f"--loop.device={device}"]
        assert main(given) == 1
        assert f"error: loop.device must name a torch device that works here, got '{device}'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
