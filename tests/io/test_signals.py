"""Ctrl-C and SIGTERM whose exception gets lost: the program ends all the same, and writes nothing more."""

import contextlib
import os
import signal
import threading

import pytest
import torch

from msdd_fast.commands.record import claim, prepare_folder
from msdd_fast.errors import InputError
from msdd_fast.io.files import atomic_write
from msdd_fast.io.json_files import append_json_lines, write_json
from msdd_fast.io.program import run_program
from msdd_fast.io.signals import raise_if_received, remembered_signals
from msdd_fast.training.data.sources import fetch
from msdd_fast.training.loop.signals import StopSignals
from msdd_fast.training.loop.state import StateStore

ENDS = [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]


def lose(number):
    """As C code does that puts an exception of its own in place of the signal's."""
    with contextlib.suppress(BaseException):
        os.kill(os.getpid(), number)


@pytest.fixture(params=ENDS, ids=["SIGINT", "SIGTERM"])
def end(request):
    before = [signal.getsignal(number) for number, *_ in ENDS]
    yield request.param
    assert [signal.getsignal(number) for number, *_ in ENDS] == before


def test_nothing_is_written_any_more(end, tmp_path, capsys):
    number, code, message = end

    def run():
        lose(number)
        with atomic_write(tmp_path / "x.txt") as path:
            path.write_text("computed after the signal")
        raise AssertionError("went on")

    assert run_program(run) == code
    assert capsys.readouterr().err == f"msdd-fast: {message}\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [None, InputError("damaged"), ValueError("odd"), OSError(28, "full")])
def test_what_came_of_it_is_not_reported(error, end, capsys):
    number, code, message = end

    def run():
        lose(number)
        if error is not None:
            raise error

    assert run_program(run) == code
    assert capsys.readouterr().err == f"msdd-fast: {message}\n"
    assert run_program(lambda: None) == 0, "the next program starts anew"


def test_a_caller_keeps_a_handler_of_its_own():
    seen = []
    before = signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))
    try:
        with remembered_signals():
            os.kill(os.getpid(), signal.SIGINT)
            raise_if_received()
    finally:
        signal.signal(signal.SIGINT, before)
    assert seen == [signal.SIGINT]


def test_a_handler_of_the_caller_that_raises_is_repeated(tmp_path):
    """As in a worker of Ray, whose handler ends the process."""

    def leave(number, frame):
        raise SystemExit(3)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        with remembered_signals():
            lose(signal.SIGTERM)
            for _ in range(2):
                with pytest.raises(SystemExit), atomic_write(tmp_path / "x"):
                    pass
            with remembered_signals():  # one that changes nothing: it does not forget either
                pass
            with pytest.raises(SystemExit):
                append_json_lines(tmp_path / "x.jsonl", [{}])
        raise_if_received()
        assert signal.getsignal(signal.SIGTERM) is leave and list(tmp_path.iterdir()) == []
    finally:
        signal.signal(signal.SIGTERM, before)


def test_nothing_is_removed_any_more(end, tmp_path):
    """What --overwrite would replace, and a state of a training run with the number of the new one."""
    number, code, _ = end
    picture, part, state = tmp_path / "x.png", tmp_path / "000000.safetensors", tmp_path / "00000001"
    for path in (picture, part):
        path.write_text("old")
    state.mkdir()
    kept = sorted(tmp_path.iterdir())
    store = StateStore(tmp_path, 1)
    for work in (
        lambda: claim({}, tmp_path / "decode.json", [picture], True),
        lambda: prepare_folder(tmp_path, "eval.json", {}, True, files="parts", content="figures"),
        lambda: store.save(1, {"x": torch.zeros(1)}, {}),
    ):

        def run(work=work):
            lose(number)
            work()

        assert run_program(run) == code
        assert [p for p in sorted(tmp_path.iterdir()) if not p.name.startswith(".")] == kept
        assert list(state.iterdir()) == [] and picture.read_text() == part.read_text() == "old"


def test_the_second_ctrl_c_of_a_training_run_is_remembered(tmp_path):
    """The first asks for a last state, which is written; after the second nothing is."""

    def run():
        with StopSignals() as stop:
            lose(signal.SIGINT)
            assert stop.received == signal.SIGINT
            write_json(tmp_path / "state.json", {})
            lose(signal.SIGINT)
            write_json(tmp_path / "later.json", {})

    assert run_program(run) == 130 and [p.name for p in tmp_path.iterdir()] == ["state.json"]


def test_a_training_run_does_not_begin_after_a_signal(end):
    number, code, _ = end

    def run():
        lose(number)
        with StopSignals():
            raise AssertionError("began")

    assert run_program(run) == code


def test_a_shard_of_a_pipe_is_not_kept_after_a_signal(end, tmp_path):
    number, code, _ = end

    def run():
        lose(number)
        fetch("head -c 10240 /dev/zero", tmp_path)

    assert run_program(run) == code and list(tmp_path.glob("*.tar")) == list(tmp_path.glob(".*")) == []


def test_another_thread_has_no_handlers():
    codes = []
    thread = threading.Thread(target=lambda: codes.append(run_program(lambda: 3)))
    thread.start()
    thread.join()
    assert codes == [3]
