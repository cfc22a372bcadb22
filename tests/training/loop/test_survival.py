"""Runs that are killed, stopped, or meet a full disk go on from their newest state as if nothing had happened."""

import contextlib
import errno
import json
import random
import resource
import shutil
import signal
import time
import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp

from msdd_fast import Tokenizer
from msdd_fast.commands.main import main
from msdd_fast.errors import CheckpointError
from msdd_fast.training.loop import state as state_module
from msdd_fast.training.loop.state import read_tensors
from tests.training.launch import TIMEOUT, command, curve, finish, start, trainer

pytest.importorskip("tyro")


def wait_for_line(out, processes, line):
    """Until log.jsonl has so many lines, or a process has ended."""
    end = time.monotonic() + TIMEOUT
    log = out / "log.jsonl"
    while not (log.exists() and log.read_text().count("\n") >= line):
        if any(p.poll() is not None for p in processes):
            return
        assert time.monotonic() < end, "the run makes no progress"
        time.sleep(0.01)


def kill_and_resume(images, tmp_path, steps, kills):
    """Runs of ``kills``: (world size, line of the log at which all of its processes are killed)."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert main(command(images, whole, steps, checkpoint_every=2)) == 0
    arguments = command(images, out, steps, checkpoint_every=2)
    saved = 0
    for world, line in kills:
        processes = start(world, arguments)
        wait_for_line(out, processes, line)
        for process in processes:
            process.kill()
        finish(processes)
        states = [int(p.name) for p in (out / "state").glob("[0-9]*")]
        assert max(states, default=0) >= saved and len(states) <= 3
        saved = max(states, default=0)
    ((status, err),) = finish(start(1, arguments))
    assert status == 0, err
    assert not list((out / "state").glob(".*"))
    a, b = curve(whole), curve(out)
    assert [line["step"] for line in b] == list(range(1, steps + 1))
    for x, y in zip(a, b, strict=True):
        assert y == pytest.approx(x, rel=1e-3, abs=1e-4)
    models = [Tokenizer.from_pretrained(folder / "checkpoint") for folder in (whole, out)]
    for p, q in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=2e-3)
    return saved


def test_killed_twice_once_in_two_processes(images, tmp_path):
    assert kill_and_resume(images, tmp_path, 10, [(1, 3), (2, 7)]) > 0


@pytest.mark.slow
def test_killed_twenty_times(images, tmp_path):
    """At random steps; the fifth and the twelfth time in two processes."""
    rng = random.Random(0)
    lines = sorted(rng.sample(range(1, 60), 20))
    kill_and_resume(images, tmp_path, 60, [(2 if i in (5, 12) else 1, line) for i, line in enumerate(lines)])


def test_sigterm_saves_and_exits(images, tmp_path):
    """One of two processes is told; both stop after the same step. The loaders' workers do not mind."""
    processes = start(2, command(images, tmp_path, 100_000, checkpoint_every=100_000, workers=1))
    try:
        wait_for_line(tmp_path, processes, 2)
        processes[1].send_signal(signal.SIGTERM)
    finally:
        results = finish(processes)
    assert [status for status, _ in results] == [143, 143], results
    (saved,) = (int(p.name) for p in (tmp_path / "state").iterdir())
    assert saved == curve(tmp_path)[-1]["step"]
    assert f"stopped after step {saved} and saved; the same command continues" in results[0][1]


def test_resuming_elsewhere_is_exact_here(images, tmp_path):
    """Same machine, same number of processes: bit for bit, the discriminator's optimiser and counters too."""
    whole = trainer("adversarial", images, tmp_path / "whole", 4)
    whole.run()
    part = trainer("adversarial", images, tmp_path / "part", 4, checkpoint_every=2, keep=5)
    part.run()
    shutil.rmtree(part.out / "state/00000004")
    again = trainer("adversarial", images, tmp_path / "part", 4)
    assert again.step == 2 and [line["step"] for line in curve(again.out)] == [1, 2]
    again.run()
    assert curve(whole.out) == curve(again.out)


@contextlib.contextmanager
def largest_file(size):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def snapshot(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_write_that_fails_loses_nothing(images, tmp_path):
    run = trainer("stage1", images, tmp_path, 4)
    run.train_step(next(run.batches()))
    run.save_state()
    before = snapshot(tmp_path)
    run.step += 1
    with largest_file(100_000), pytest.raises(CheckpointError) as caught:
        run.save_state()
    assert str(caught.value) == (
        f"cannot save {tmp_path}/state/00000002: File too large; the run stops, the last saved state is that of step 1"
    )
    assert snapshot(tmp_path) == before
    assert trainer("stage1", images, tmp_path, 4).step == 1


@pytest.mark.parametrize("step", [0, 1])
def test_a_full_disk(images, tmp_path, monkeypatch, step):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    run = trainer("stage1", images, tmp_path, 4)
    for run.step in range(1, step + 1):
        run.save_state()
    before = snapshot(tmp_path)
    run.step = step + 1
    monkeypatch.setattr(state_module.os, "fsync", full)
    left = "the last saved state is that of step 1" if step else "no state has been saved yet"
    with pytest.raises(CheckpointError, match=f"cannot save .*: No space left on device; the run stops, {left}$"):
        run.save_state()
    assert snapshot(tmp_path) == before and not list((tmp_path / "state").glob(".*"))


def test_which_states_stay(images, tmp_path):
    """The newest two and the best."""
    run = trainer("stage1", images, tmp_path, 10, keep=2)
    for run.step in range(1, 6):
        run.best = {"step": min(run.step, 2), "psnr_db": 1.0}
        run.save_state()
    assert run.store.steps() == [2, 4, 5]
    assert json.loads((tmp_path / "state/00000005/metadata.json").read_text())["best"]["step"] == 2


def test_damaged_and_foreign_states(images, tmp_path, caplog):
    run = trainer("stage1", images, tmp_path, 4)
    for run.step in (1, 2):
        run.save_state()
    (newest,) = (tmp_path / "state/00000002").glob("*.safetensors")
    newest.write_bytes(newest.read_bytes()[:1000])
    assert trainer("stage1", images, tmp_path, 4).step == 1
    assert "00000002: it is damaged" in caplog.text and "continuing from the state before it" in caplog.text
    with pytest.raises(CheckpointError, match="its batch_size is not this run's; choose another out folder"):
        trainer("stage1", images, tmp_path, 4, batch_size=8)
    for sums in (tmp_path / "state").glob("*/SHA256SUMS"):
        sums.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"cannot resume from .*00000001: it is damaged"):
        trainer("stage1", images, tmp_path, 4)


def as_version_0_1(state):
    """Write a state as version 0.1 did."""
    tensors = read_tensors(state)
    (state / "metadata.json").rename(state / "facts.json")
    for file in (*state.glob("*.safetensors"), state / "SHA256SUMS"):
        file.unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about being a single process
        dcp.save(tensors, storage_writer=dcp.FileSystemWriter(state), no_dist=True)


def test_a_state_of_version_0_1(images, tmp_path):
    """Its metadata are in facts.json: it resumes, and the next state has the new name."""
    whole = trainer("stage1", images, tmp_path / "whole", 4)
    whole.run()
    old = trainer("stage1", images, tmp_path / "old", 4, checkpoint_every=2, keep=5)
    old.run()
    shutil.rmtree(old.out / "state/00000004")
    as_version_0_1(old.out / "state/00000002")
    resumed = trainer("stage1", images, tmp_path / "old", 4)
    assert resumed.step == 2
    resumed.run()
    assert curve(whole.out) == curve(resumed.out)
    for p, q in zip(whole.ema.model.parameters(), resumed.ema.model.parameters(), strict=True):
        assert torch.equal(p, q)
    assert (old.out / "state/00000004/metadata.json").exists()
    assert main(["convert", str(old.out / "state/00000002"), str(tmp_path / "model")]) == 0


def test_export_of_a_state(images, tmp_path):
    run = trainer("stage1", images, tmp_path, 2)
    run.run()
    for weights, model in (("ema", run.ema.model), ("model", run.tokenizer)):
        out = tmp_path / weights
        assert main(["convert", str(tmp_path / "state/00000002"), str(out), "--weights", weights]) == 0
        for p, q in zip(model.parameters(), Tokenizer.from_pretrained(out).parameters(), strict=True):
            assert torch.equal(p, q)
    assert main(["convert", str(tmp_path / "samples"), str(tmp_path / "no")]) == 1
