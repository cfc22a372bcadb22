"""The training loop: exact resume, outputs, optimisers, schedule, and that it learns."""

import dataclasses
import json

import pytest
import torch
from PIL import Image

from msdd_fast import Tokenizer
from msdd_fast.commands.main import main
from msdd_fast.errors import CheckpointError, ConfigError
from msdd_fast.training.data import ImageDataset, find_images
from msdd_fast.training.loop.config import LoopConfig, OptimConfig
from msdd_fast.training.loop.muon import Muon, orthogonalize
from msdd_fast.training.loop.optimizers import build_optimizers, learning_rate_factor
from msdd_fast.training.loop.trainer import Trainer
from msdd_fast.training.recipes.msdd_stage1 import MSDDTrainConfig, Stage1Config, Stage1Recipe


def trainer(images, out, steps, optimizer="adamw", **loop):
    torch.manual_seed(0)
    loop = {"batch_size": 4, "precision": "float32", "device": "cpu", "workers": 0, "log_every": 1, **loop}
    return Trainer(
        Tokenizer.from_config("tiny"),
        ImageDataset(find_images([images]), 64, seed=0),
        Stage1Recipe(Stage1Config()),
        out,
        OptimConfig(optimizer=optimizer, lr=2e-3, warmup_steps=3, ema_decay=0.9),
        LoopConfig(steps=steps, **loop),
        preview=torch.zeros(1, 3, 64, 64),
    )


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_resume_is_exact(images, tmp_path, optimizer):
    """Stopped after 3 of 6 steps and continued: the same weights, bit for bit, as in one go."""
    whole = trainer(images, tmp_path / "whole", 6, optimizer).run()
    part = trainer(images, tmp_path / "part", 6, optimizer, checkpoint_every=3)
    batches = part.batches()
    for _ in range(3):
        part.train_step(next(batches))
    part.save_state()
    resumed = trainer(images, tmp_path / "part", 6, optimizer)
    assert resumed.step == 3
    for a, b in zip(whole.parameters(), resumed.run().parameters(), strict=True):
        assert torch.equal(a, b)


def test_what_a_run_leaves_behind(images, tmp_path):
    trainer(images, tmp_path, 4, sample_every=2, checkpoint_every=2).run()
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [1, 2, 3, 4]
    assert {"loss", "lr", "grad_norm", "img_per_s", "mse/8", "mse/64"} <= set(log[0])
    assert sorted(p.name for p in (tmp_path / "samples").iterdir()) == ["000002.png", "000004.png"]
    assert Image.open(tmp_path / "samples/000004.png").width > 64
    Tokenizer.from_pretrained(tmp_path / "checkpoint")
    assert not list(tmp_path.glob("*.tmp"))


def test_it_learns(images, tmp_path):
    """Fifteen steps bring the loss well below its start, for the averaged weights too."""
    run = trainer(images, tmp_path, 15, "muon")
    run.run()
    losses = [json.loads(line)["loss"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])


def test_a_foreign_or_damaged_state_is_refused(images, tmp_path):
    run = trainer(images, tmp_path, 2)
    run.save_state()
    with pytest.raises(CheckpointError, match="its seed is not this run's; choose another out folder"):
        trainer(images, tmp_path, 2, seed=1)
    (tmp_path / "state.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"state.pt: an earlier version wrote it"):
        trainer(images, tmp_path, 2)


def test_no_steps(images, tmp_path):
    with pytest.raises(ConfigError, match="steps must be at least 1, got 0"):
        trainer(images, tmp_path, 0)


def test_learning_rate():
    config = OptimConfig(warmup_steps=10, min_lr_ratio=0.1)
    factors = [learning_rate_factor(s, 110, config) for s in range(111)]
    assert factors[0] == pytest.approx(0.1) and factors[10] == 1.0 and factors[-1] == pytest.approx(0.1)
    assert factors[60] == pytest.approx(0.55) and max(factors) == 1.0


def test_every_parameter_has_one_optimizer():
    tok = Tokenizer.from_config("tiny")
    for optimizer in ("adamw", "muon"):
        groups = [g for o in build_optimizers(tok, OptimConfig(optimizer=optimizer)) for g in o.param_groups]
        ids = [id(p) for g in groups for p in g["params"]]
        assert sorted(ids) == sorted(id(p) for p in tok.parameters())


@pytest.mark.parametrize("shape", [(32, 32), (48, 16), (16, 48), (2, 16, 24)])
def test_orthogonalize(shape):
    singular = torch.linalg.svdvals(orthogonalize(torch.randn(shape, generator=torch.Generator().manual_seed(0))))
    assert singular.min() > 0.3 and singular.max() < 1.3


def test_muon_splits_fused_projections():
    """q, k and v are orthogonalised apart: scaling the gradient of one leaves all three updates as they were."""
    updates = []
    for factor in (1.0, 1000.0):
        p = torch.nn.Parameter(torch.zeros(48, 16))
        p.grad = torch.randn(48, 16, generator=torch.Generator().manual_seed(0))
        p.grad[:16] *= factor
        Muon([p], lr=0.1).step()
        updates.append(p.detach().clone())
    torch.testing.assert_close(updates[0], updates[1], rtol=1e-3, atol=1e-4)


def test_command_line(images, tmp_path, capsys):
    options = f"--data {images} --out {tmp_path}/run --preset tiny --optim.optimizer adamw --optim.warmup-steps 1"
    loop = "--loop.steps 2 --loop.batch-size 4 --loop.workers 0 --loop.device cpu --loop.precision bfloat16"
    assert main(["train", *options.split(), *loop.split()]) == 0
    Tokenizer.from_pretrained(tmp_path / "run/checkpoint")
    assert json.loads((tmp_path / "run/config.json").read_text())["preset"] == "tiny"
    assert main(["train", "--data", str(tmp_path / "none"), "--out", str(tmp_path / "x")]) == 1
    assert "data must be folders or .tar shards" in capsys.readouterr().err


class OldRecipe(Stage1Recipe):
    """As recipes of version 0.1 were: a loss and its metrics as a pair."""

    def loss(self, *args):
        value, metrics = super().loss(*args)
        return value, {**metrics, "mine": torch.tensor(1.0)}


def test_a_loss_may_be_a_pair(images, tmp_path):
    run = trainer(images, tmp_path, 1)
    run.recipe = OldRecipe(Stage1Config())
    run.run()
    assert json.loads((tmp_path / "log.jsonl").read_text())["mine"] == 1


def test_zero_clips_nothing(images, tmp_path):
    """grad_clip 0 steps as a limit does that is never reached."""
    weights = []
    for clip in (0, 1e9):
        run = trainer(images, tmp_path / str(clip), 2)
        run.optim = dataclasses.replace(run.optim, grad_clip=clip)
        weights.append(run.run().state_dict())
    assert all(torch.equal(t, weights[1][name]) for name, t in weights[0].items())


def test_fine_tuning(images, tmp_path, capsys):
    """--start takes the weights, and the family, of a checkpoint."""
    tok = Tokenizer.from_config("tiny")
    with torch.no_grad():
        for p in tok.parameters():
            p.add_(0.01)
    tok.save_pretrained(tmp_path / "start")
    loop = ["--loop.steps=1", "--loop.batch-size=1", "--loop.workers=0", "--loop.device=cpu", "--optim.lr=1e-12"]
    given = ["train", f"--data={images}", f"--start={tmp_path / 'start'}", "--loop.precision=float32", *loop]
    assert main([*given, f"--out={tmp_path / 'run'}"]) == 0
    tuned = Tokenizer.from_pretrained(tmp_path / "run/checkpoint")
    assert tuned.config == tok.config
    for p, q in zip(tok.parameters(), tuned.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)
    Tokenizer.from_config("tiny-ssdd").save_pretrained(tmp_path / "ssdd")
    given[2] = f"--start={tmp_path / 'ssdd'}"
    assert main([*given, f"--out={tmp_path / 'ssdd-run'}", "--perceptual=random", "--image-size=32"]) == 0
    assert Tokenizer.from_pretrained(tmp_path / "ssdd-run/checkpoint").config.family == "ssdd"
    config = MSDDTrainConfig(("x",), "y", start=str(tmp_path / "ssdd"))
    with pytest.raises(ConfigError, match="start must be of the family msdd, got"):
        config.build()
    with pytest.raises(ConfigError, match="stages_per_image must be at most the model's"):
        MSDDTrainConfig(("x",), "y", preset="tiny", objective=Stage1Config(stages_per_image=60)).build()


def test_training_imports_where_posix_modules_are_missing(fresh):
    """As on Windows, which has neither fcntl nor resource."""
    code = (
        "import sys; sys.modules.update(fcntl=None, resource=None)\n"
        "import msdd_fast.training.run\n"
        "from msdd_fast.training.recipes import msdd_stage2, ssdd_distill\n"
        "from msdd_fast.training.loop.memory import memory_gib\n"
        "from msdd_fast.training.loop.lock import RunLock\n"
        "import pathlib, tempfile; RunLock.take(pathlib.Path(tempfile.mkdtemp()))\n"
        "assert memory_gib('cpu') != memory_gib('cpu')"
    )
    fresh(code, check=True)
