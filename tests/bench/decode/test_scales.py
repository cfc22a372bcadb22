"""The per-scale timing that the demo prints."""

import pytest

from msdd_fast import Tokenizer
from msdd_fast.bench.decode.scales import format_table, measure_scales


def test_every_scale_and_the_whole_decode():
    timings = measure_scales(Tokenizer.from_config("tiny"), batch=2, rounds=3)
    assert [t.resolution for t in timings] == [8, 16, 32, 64, 0]
    assert all(t.images_per_second == pytest.approx(2 / t.seconds) for t in timings)
    assert max(t.seconds for t in timings[:-1]) < timings[-1].seconds
    table = format_table(timings).splitlines()
    assert len(table) == 6 and table[1].split()[:2] == ["8", "px"] and table[-1].startswith("whole decode")


def test_the_clean_estimate_is_not_timed(monkeypatch):
    monkeypatch.setattr("msdd_fast.sampling.clean_estimate", lambda *_: pytest.fail("computed while timing"))
    measure_scales(Tokenizer.from_config("tiny"), batch=1, rounds=1)
