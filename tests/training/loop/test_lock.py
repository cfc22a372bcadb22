"""One run at a time in a folder."""

import pytest

from msdd_fast.commands.main import main
from msdd_fast.errors import InputError
from msdd_fast.training.loop.lock import RunLock
from tests.training.launch import command, start
from tests.training.loop.test_survival import snapshot, wait_for_line

pytest.importorskip("tyro")
pytest.importorskip("fcntl")


def test_a_second_run_is_refused_and_the_first_undisturbed(images, tmp_path, capsys):
    """Until the first has gone, killed or not; data-loading workers that outlive it hold nothing."""
    out = tmp_path / "run"
    arguments = command(images, out, 100_000, checkpoint_every=100_000, workers=1)
    (first,) = start(1, arguments)
    try:
        wait_for_line(out, [first], 2)
        config = (out / "config.json").read_bytes()
        with pytest.raises(InputError, match=f"in use: another run, process {first.pid} on .*; wait for it or choose"):
            RunLock.take(out)
        assert main(command(images, out, 7)) == 1
        assert f"out {out} is in use" in capsys.readouterr().err
        assert (out / "config.json").read_bytes() == config and first.poll() is None
    finally:
        first.kill()
        first.wait()  # not for the end of its output, which its workers hold open for some seconds
        first.stdout.close()
        first.stderr.close()
    before = snapshot(out)
    lock = RunLock.take(out)
    assert RunLock.take(out) is lock
    assert snapshot(out).keys() == before.keys()
