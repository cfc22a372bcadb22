"""Spoilt steps are skipped; unreadable images are counted; validation metrics."""

import json
import multiprocessing

import pytest
import torch

from msdd_fast import Tokenizer
from msdd_fast.errors import ConfigError, InputError, TrainingError
from msdd_fast.training.loop.guard import Guard, GuardConfig
from msdd_fast.training.loop.validation import Validation
from tests.training.launch import curve, trainer

NAN, INF = float("nan"), float("inf")


def test_spikes_and_nan():
    guard = Guard(GuardConfig(spike_factor=5, after=3, max_in_a_row=3))
    assert all(guard.accepts(i, loss=1.0, grad_norm=n) for i, n in enumerate((100, 1, 1)))  # too early to be a spike
    assert not guard.accepts(3, loss=NAN, grad_norm=1) and not guard.accepts(4, loss=1, grad_norm=INF)
    assert guard.accepts(5, loss=-1, grad_norm=1)
    assert not guard.accepts(6, loss=5.1, grad_norm=1) and guard.accepts(7, loss=4.9, grad_norm=1)
    assert guard.skipped == 3
    copy = Guard(guard.config)
    copy.load(json.loads(json.dumps(guard.state())))
    for g in (guard, copy):
        assert not g.accepts(8, loss=100, grad_norm=1) and not g.accepts(9, loss=100, grad_norm=1)
        with pytest.raises(TrainingError, match=r"3 steps in a row were skipped, the last \(step 10\)"):
            g.accepts(10, loss=100, grad_norm=1)


def test_only_nan_without_a_factor():
    guard = Guard(GuardConfig(spike_factor=0, after=1))
    assert guard.accepts(0, loss=1.0) and guard.accepts(1, loss=1e9) and not guard.accepts(2, loss=NAN)
    for bad in (dict(spike_factor=0.5), dict(after=0), dict(max_in_a_row=0)):
        with pytest.raises(ConfigError, match=r"guard\."):
            GuardConfig(**bad)


def test_a_nan_step_changes_nothing_and_too_many_end_the_run(images, tmp_path):
    run = trainer("adversarial", images, tmp_path, steps=8, guard=GuardConfig(max_in_a_row=2))
    batches = run.batches()
    run.train_step(next(batches))
    before = {n: t.clone() for m in (run.tokenizer, run.ema.model) for n, t in m.state_dict().items()}
    heads = [p.detach().clone() for p in run.critic.module.parameters()]
    bad = [b._replace(images=b.images * NAN) for b in next(batches)]
    assert run.train_step(bad)["skipped_steps"] == 1 and run.step == 2
    after = {n: t for m in (run.tokenizer, run.ema.model) for n, t in m.state_dict().items()}
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert all(torch.equal(a, b) for a, b in zip(heads, run.critic.module.parameters(), strict=True))
    assert run.train_step(next(batches))["skipped_steps"] == 1  # and it goes on
    run.train_step(bad)
    with pytest.raises(TrainingError, match="2 steps in a row were skipped"):
        run.train_step(bad)


def test_unreadable_pictures_are_counted_and_named(images, tmp_path, capsys):
    folder = tmp_path / "data"
    folder.mkdir()
    for file in sorted(images.iterdir())[:2]:
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "text.jpg").write_text("no picture")
    run = trainer("stage1", folder, tmp_path / "out", steps=3, batch_size=4, checkpoint_every=2)
    run.run()  # 12 samples of 3 pictures: four times the bad one
    assert curve(run.out)[-1]["unreadable"] == run.unreadable == 4
    lines = [json.loads(line) for line in (run.out / "unreadable.jsonl").read_text().splitlines()]
    assert len(lines) == 1 and lines[0]["image"].endswith("text.jpg")  # each image once
    assert capsys.readouterr().err.count("skipped: ") == 1
    assert trainer("stage1", folder, tmp_path / "out", steps=3, batch_size=4).unreadable == 4
    with pytest.raises(InputError, match=r"text.jpg is not a readable image: its format is not known.*\(strict\)"):
        trainer("stage1", folder, tmp_path / "strict", steps=3, strict=True).run()
    for file in folder.glob("*.png"):
        file.unlink()
    for workers in (0, 1):
        with pytest.raises(InputError, match=r"^1 images in a row cannot be read, the last: .*text.jpg"):
            trainer("stage1", folder, tmp_path / "none", steps=3, workers=workers).run()
        # The loader's workers ignore SIGTERM: left over, they would keep Python from exiting.
        assert not multiprocessing.active_children()


def test_held_out_figures_choose_the_best(images, tmp_path):
    run = trainer("stage1", images, tmp_path, steps=3, sample_every=1, checkpoint_every=100, keep=1)
    run.validation = Validation(sorted(images.iterdir()), 64, "cpu", batch=4)
    run.run()
    figures = {line["step"]: line["val/psnr_db"] for line in curve(tmp_path) if "val/psnr_db" in line}
    assert list(figures) == [1, 2, 3]
    best = max(figures, key=figures.get)
    assert run.store.steps() == sorted({best, 3})
    assert run.best == {"step": best, "psnr_db": pytest.approx(figures[best], abs=1e-5)}
    again = Validation(sorted(images.iterdir()), 64, "cpu", batch=1).measure(run.ema.model)
    assert again["psnr_db"] == pytest.approx(figures[3], abs=1e-4)


def test_tensorboard_has_every_figure(images, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    trainer("stage1", images, tmp_path, steps=3, tensorboard=True).run()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    lines = curve(tmp_path)
    assert set(lines[0]) - {"step"} <= set(events.Tags()["scalars"]) and "loss" in lines[0]
    written = {e.step: e.value for e in events.Scalars("loss")}
    assert written == {line["step"]: pytest.approx(line["loss"], abs=1e-5) for line in lines}


def test_tensorboard_is_optional(images, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match="tensorboard is not installed"):
        trainer("stage1", images, tmp_path, tensorboard=True).run()
    assert isinstance(trainer("stage1", images, tmp_path, steps=1).run(), Tokenizer)


def test_a_broken_held_out_image_is_found_before_the_first_step(images, tmp_path):
    files = [*sorted(images.iterdir())[:2], tmp_path / "cut.jpg", tmp_path / "text.png"]
    for file in files[2:]:
        file.write_bytes(b"\xff\xd8\xff\xe0 cut off")
    with pytest.raises(InputError, match=r"^val has 2 unreadable images: .*cut.jpg is not a readable image"):
        Validation(files, 64, "cpu")


def test_a_held_out_image_that_goes_away_does_not_end_the_run(images, tmp_path, caplog):
    (tmp_path / "val.png").write_bytes((images / "0.png").read_bytes())
    run = trainer("stage1", images, tmp_path / "run", steps=3, sample_every=1, checkpoint_every=3)
    run.validation = Validation([tmp_path / "val.png"], 64, "cpu")
    (tmp_path / "val.png").unlink()
    run.run()
    assert "no validation at step 3: image file" in caplog.text and run.store.steps() == [3]
    assert not any("val/psnr_db" in line for line in curve(run.out)) and (run.out / "checkpoint").exists()


def test_the_state_is_saved_before_pictures_and_validation(images, tmp_path, monkeypatch):
    """Whatever ends the run there, it goes on from this step, and the log is that of an undisturbed run."""
    loop = dict(steps=4, sample_every=2, checkpoint_every=2, keep=9)

    def new(name):
        run = trainer("stage1", images, tmp_path / name, **loop)
        run.validation = Validation(sorted(images.iterdir())[:2], 64, "cpu")
        return run

    new("whole").run()
    run = new("part")
    monkeypatch.setattr(run.validation, "measure", lambda tokenizer: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run.run()
    assert run.store.steps() == [2]
    again = new("part")
    assert again.step == 2
    again.run()
    assert curve(tmp_path / "whole") == curve(tmp_path / "part") and again.best is not None


def test_a_validation_without_a_number_is_not_the_best(images, tmp_path, monkeypatch):
    run = trainer("stage1", images, tmp_path, steps=3, sample_every=1, checkpoint_every=100)
    run.validation = Validation([images / "0.png"], 64, "cpu")
    figures = iter([NAN, 20.0, NAN])
    monkeypatch.setattr(run.validation, "measure", lambda tokenizer: {"psnr_db": next(figures)})
    run.run()
    assert run.best == {"step": 2, "psnr_db": 20.0}
