"""Ctrl-C and SIGTERM whose exception gets lost: the program ends all the same, and writes nothing more."""

import contextlib
import os
import signal
import threading

import pytest

from msdd_fast.errors import InputError
from msdd_fast.io.files import atomic_write
from msdd_fast.io.program import run_program
from msdd_fast.io.signals import raise_if_received, remembered_signals

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


def test_another_thread_has_no_handlers():
    codes = []
    thread = threading.Thread(target=lambda: codes.append(run_program(lambda: 3)))
    thread.start()
    thread.join()
    assert codes == [3]
