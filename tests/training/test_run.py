"""Training programs by family and command; one of another family, registered from outside."""

from dataclasses import dataclass

import pytest
import torch

from msdd_fast import Tokenizer
from msdd_fast.checkpoint import ASSETS
from msdd_fast.errors import ConfigError
from msdd_fast.training.command_line import parse_option, run_command
from msdd_fast.training.config import Components, RunConfig
from msdd_fast.training.loop.config import AdamConfig, LoopConfig, OptimConfig
from msdd_fast.training.loop.objective import Critic, Loss
from msdd_fast.training.run import RECIPES, TrainSpec, find_spec, make_trainer
from tests.training.launch import curve


def test_every_program_is_found_and_loads():
    for name, spec in RECIPES.items():
        assert spec.name == name and find_spec(spec.command, spec.family) is spec
        assert issubclass(spec.load(), RunConfig)
    assert find_spec("train").name == "msdd-stage1" and find_spec("distill").name == "msdd-stage2"
    with pytest.raises(
        ConfigError, match="msdd-fast distill has no recipe for the family vae; it has one for msdd, ssdd"
    ):
        find_spec("distill", "vae")


def test_options_come_from_the_command_line_or_the_configuration(tmp_path):
    file = tmp_path / "c.json"
    file.write_text('{"preset": "tiny", "teacher": 1}')
    assert parse_option(["--preset", "a", "--config", str(file)], "preset") == "a"
    assert parse_option(["--config", str(file), "--data", "x"], "preset") == "tiny"
    assert parse_option(["--config=stage1-joint-4scale"], "preset") == "msdd-d12-joint"
    assert parse_option(["--config", str(file)], "teacher") is None
    assert parse_option(["--config", str(tmp_path / "none.json")], "preset") is None
    assert parse_option(["--config", str(ASSETS / "msdd-nano/train.json")], "preset") == "msdd-nano"


class Recipe:
    """The mean of the image must be that of the reconstruction; the critic sees what each micro-batch left for it."""

    def __init__(self):
        self.seen = []

    def loss(self, tokenizer, images, draws):
        x = tokenizer.decoder(images, torch.ones(len(images)), tokenizer.encoder(images))
        return Loss((x.mean() - images.mean()).square(), {"mine": x.detach().mean()}, draws.samples.tolist())

    def preview(self, tokenizer, images):
        return [images.flip(2), images.flip(3)]

    def critic_loss(self, samples):
        self.seen.append(samples)
        return Loss(self.head(torch.ones(1, 1)).square().sum(), {"critics": torch.tensor(float(len(samples)))})


@dataclass(frozen=True)
class OtherConfig(RunConfig):
    """A program of another family."""

    preset: str = "tiny"

    def build(self):
        torch.manual_seed(0)
        recipe = Recipe()
        recipe.head = torch.nn.Linear(1, 1)
        return Components(
            Tokenizer.from_config("tiny"), recipe, "other", Critic(recipe.head, recipe.critic_loss, AdamConfig())
        )


LOOP = {"batch_size": 6, "micro_batch": 2, "precision": "float32", "device": "cpu", "workers": 0, "log_every": 1}


def test_the_critic_gets_what_every_micro_batch_left(images, tmp_path):
    config = OtherConfig((str(images),), str(tmp_path / "run"), optim=OptimConfig(lr=1e-3), loop=LoopConfig(2, **LOOP))
    trainer = make_trainer(config)
    trainer.run()
    assert trainer.recipe.seen == [[[0, 1], [2, 3], [4, 5]], [[6, 7], [8, 9], [10, 11]]]
    assert [line["critics"] for line in curve(tmp_path / "run")] == [3, 3]


def test_a_program_from_outside(images, tmp_path, monkeypatch):
    """One line makes it known to the command line."""
    pytest.importorskip("tyro")
    monkeypatch.setitem(RECIPES, "other", TrainSpec("other", "other", "train", f"{__name__}:OtherConfig"))
    monkeypatch.setattr("msdd_fast.training.command_line._family", lambda command, arguments: "other")
    options = [f"--loop.{name.replace('_', '-')}={value}" for name, value in {**LOOP, "steps": 1}.items()]
    run_command("train", "", [f"--data={images}", f"--out={tmp_path / 'run'}", *options])
    assert curve(tmp_path / "run")[0]["mine"] is not None and (tmp_path / "run/samples/000001.png").exists()
    Tokenizer.from_pretrained(tmp_path / "run/checkpoint")
