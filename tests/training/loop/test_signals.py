"""Ctrl-C saves as SIGTERM does; a second one leaves at once."""

import os
import signal
import time

import pytest

from msdd_fast.training.loop.signals import StopSignals
from tests.training.launch import command, curve, finish, start
from tests.training.loop.test_survival import wait_for_line

pytest.importorskip("tyro")


def test_ctrl_c_saves(images, tmp_path):
    """Both processes of the terminal's group get it, their loaders' workers too."""
    (run,) = start(1, command(images, tmp_path, 100_000, checkpoint_every=100_000, workers=1))
    try:
        wait_for_line(tmp_path, [run], 2)
        run.send_signal(signal.SIGINT)
    finally:
        ((status, err),) = finish([run])
    assert status == 130, err
    (saved,) = (int(p.name) for p in (tmp_path / "state").iterdir())
    assert saved == curve(tmp_path)[-1]["step"] and "Traceback" not in err
    assert "saving after this step; Ctrl-C again leaves at once" in err
    assert f"stopped after step {saved} and saved; the same command continues" in err


def test_a_second_ctrl_c_leaves_at_once(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(KeyboardInterrupt), StopSignals() as stop:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
        assert stop.received == signal.SIGTERM
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == before


def test_torchruns_ctrl_c_comes_twice(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with StopSignals() as stop:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        assert stop.received == signal.SIGINT
