"""What every example of a fuzzer must obey, and the totals."""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from msdd_fast.errors import MsddFastError

SECONDS = 20
"""An example that takes longer hangs."""
COLUMNS = ("tried", "refused", "accepted", "wrong", "crashed", "hung")
TOTALS: dict[str, Counter[str]] = {}


class HungError(BaseException):
    """An example has taken more than SECONDS."""


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    def expired(number: int, frame: object) -> None:
        raise HungError

    before = signal.signal(signal.SIGALRM, expired)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def obeys(name: str, run: Callable[[], Any], is_right: Callable[[Any], bool] = lambda result: True) -> None:
    """Count one example of the fuzzer ``name``: ``run`` gives a right result or raises an error of ours.

    Raises what else it raises, HungError, or AssertionError for a wrong result.
    """
    total = TOTALS.setdefault(name, Counter())
    total["tried"] += 1
    outcome = "crashed"
    try:
        with limited(SECONDS):
            try:
                result = run()
            except MsddFastError:
                outcome = "refused"
                return
            outcome = "wrong"
            assert is_right(result)
            outcome = "accepted"
    except HungError:
        outcome = "hung"
        raise
    finally:
        total[outcome] += 1
