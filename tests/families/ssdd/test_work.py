"""SSDD's FLOP by formula: against the authors' network, and torch's counter on the eager model and on the engine."""

import pytest
import torch

from msdd_fast import Tokenizer, accelerate
from msdd_fast.backends import use_backend
from msdd_fast.errors import InputError
from msdd_fast.families import family_of
from msdd_fast.families.ssdd.presets import SSDD_PRESETS
from msdd_fast.families.ssdd.work import decode_work, keys_seen
from msdd_fast.families.work import total
from tests.families.flops import counted

# GFLOP of one evaluation at 256 px with dense attention; of M at other sizes.
# GFLOP of the authors' network, by torch's counter, at 256 px; of size M at other sides.
EXPECTED = {"s": 174.0, "b": 238.8, "m": 538.8, "l": 701.9, "xl": 1235.9, "h": 2753.9}
EXPECTED_M = {128: 132.0, 512: 2329.0, 1024: 12100.0}


def gflop(size, **options):
    return total(decode_work(SSDD_PRESETS[f"ssdd-{size}-f8c4"], **options)).flops / 1e9


def test_gflop_of_every_size():
    for size, expected in EXPECTED.items():
        assert gflop(size, hoisted=False) == pytest.approx(expected, rel=0.001)
    for side, expected in EXPECTED_M.items():
        assert gflop("m", hoisted=False, sides=(side, side)) == pytest.approx(expected, rel=0.001)


def test_what_the_engine_saves():
    """What the engine saves per step: 41 GFLOP of upsampling, 12 of attention; from the second on 4.6 of z."""
    assert gflop("m", hoisted=False) - gflop("m") == pytest.approx(41.2 + 12.0, rel=0.01)
    assert 2 * gflop("m") - gflop("m", steps=2) == pytest.approx(4.6, rel=0.05)
    assert keys_seen(32, 32, 8) / 32**2 == pytest.approx(175.6, abs=0.05)


@pytest.mark.parametrize(("batch", "steps", "sides"), [(1, 1, (8, 8)), (2, 3, (4, 6))])
def test_formula_against_the_counter(batch, steps, sides):
    tok = Tokenizer.from_config("tiny-ssdd")
    z, pixels = torch.randn(batch, 4, *sides), (8 * sides[0], 8 * sides[1])
    with use_backend("eager"):
        eager = counted(lambda: tok.decode(z, steps=steps))
    assert total(decode_work(tok.config, batch, steps, hoisted=False, sides=pixels)).flops == eager
    engine = accelerate(tok, dtype=torch.float32, steps=steps, graphs=False)
    work = decode_work(tok.config, batch, steps, sides=pixels)
    attention = sum(w.flops for w in work if w.op == "mid.attention")
    assert total(work).flops - attention == counted(lambda: engine.decode(z))  # it does not know our ops


def test_the_family_counts_decodes_and_says_that_it_counts_no_encodes():
    family = family_of(SSDD_PRESETS["tiny-ssdd"])
    assert family.decode_work(batch=2, hoisted=False) == decode_work(SSDD_PRESETS["tiny-ssdd"], batch=2, hoisted=False)
    with pytest.raises(InputError, match="the work of an SSDD encode is not counted"):
        family.encode_work()
