"""PiD's FLOP by formula: against the authors' network, and torch's counter on the eager model and on the engine."""

from collections import defaultdict
from dataclasses import replace

import pytest
import torch

from msdd_fast import Tokenizer, accelerate
from msdd_fast.backends import use_backend
from msdd_fast.errors import InputError
from msdd_fast.families import family_of
from msdd_fast.families.pid.presets import PID_PRESETS
from msdd_fast.families.pid.work import decode_work
from msdd_fast.families.work import total
from tests.families.flops import counted
from tests.families.pid.models import TINY, captions, latents, random_tokenizer

# GFLOP of one evaluation of the released networks with a caption of 300 rows; at 512 px equal to torch's counter.
V15 = {512: 1633, 1024: 6983, 2048: 46361, 4096: 491462}
V1 = {512: 1555, 1024: 6673, 2048: 45121, 4096: 486501}
# Of version 1.5 at 2048 px, by part.
PARTS = {
    "image": 12988,
    "text": 238,
    "attention": 23943,
    "time": 0.8,
    "embed": 42,
    "pixel.modulate": 2474,
    "pixel.linear": 966,
    "pixel.attention": 2474,
    "pixel.mlp": 34.4,
    "latents.conv": 2788,
    "latents.head": 412,
    "gate": 0.8,
}
FOUR_STEPS = {("pid-v15-flux", 512): 5.93e3, ("pid-v15-flux", 2048): 175.8e3, ("pid-flux", 2048): 176.2e3}


def gflop(name, side, **options):
    return total(decode_work(PID_PRESETS[name], sides=(side, side), **options)).flops / 1e9


def part(op):
    if op in ("time_embed", "adaln"):
        return "time"
    if op in ("patch_embed", "text_embed", "pixel_embed", "final"):
        return "embed"
    if op in ("pixel.compress", "pixel.expand", "pixel.qkv", "pixel.proj"):
        return "pixel.linear"
    if op.startswith("pixel.modulate"):
        return "pixel.modulate"
    return op.split(".")[0] if op.startswith(("image.", "text.")) else op


def test_gflop_of_released_sizes():
    for side, expected in V15.items():
        assert gflop("pid-v15-flux", side, hoisted=False) == pytest.approx(expected, rel=0.001)
    for side, expected in V1.items():
        assert gflop("pid-flux", side, hoisted=False) == pytest.approx(expected, rel=0.001)


def test_gflop_of_every_part():
    found = defaultdict(float)
    for w in decode_work(PID_PRESETS["pid-v15-flux"], hoisted=False):
        found[part(w.op)] += w.flops / 1e9
    assert {p for p, f in found.items() if f > 0} == set(PARTS)
    for name, expected in PARTS.items():
        assert found[name] == pytest.approx(expected, rel=0.01, abs=0.06), name


def test_what_the_engine_saves():
    """Once per image instead of four times: the latents, their half of the gates, the caption. The last block's caption
    is dead: of one evaluation at 2048 px 12.7 GFLOP of products and 31 of attention."""
    for (name, side), expected in FOUR_STEPS.items():
        dead = 0.0127e3 + 31 * (side / 2048) ** 2
        assert gflop(name, side, steps=4) == pytest.approx(expected - 4 * dead, rel=0.01)
    weights = [total(decode_work(PID_PRESETS["pid-v15-flux"], hoisted=h)).weight_bytes for h in (False, True)]
    assert (weights[0] - weights[1]) / 2 == pytest.approx(399.4e6 + 21.2e6 + 2.36e6, rel=0.001)


V1_TINY = replace(TINY, features=replace(TINY.features, gate="channel", pixel_injection=False))


@pytest.mark.parametrize(("config", "batch", "steps", "sides"), [(TINY, 1, 1, (2, 2)), (V1_TINY, 2, 2, (1, 2))])
def test_formula_against_the_counter(config, batch, steps, sides):
    """Exactly, for the eager model and for the engine with eager ops."""
    tok = random_tokenizer(config)
    z, text, pixels = latents(batch, 4, *sides), captions(batch, rows=7), (32 * sides[0], 32 * sides[1])
    with use_backend("eager"):
        eager = counted(lambda: tok.decode(z, steps=steps, text=text))
    options = {"batch": batch, "steps": steps, "sides": pixels, "text_rows": 7}
    assert total(decode_work(config, hoisted=False, **options)).flops == eager
    engine = accelerate(tok, dtype=torch.float32, steps=steps)
    work = decode_work(config, **options)
    # A gate per token is a sum of products in sigma_gate, which the counter does not know.
    unknown = sum(w.flops for w in work if w.op == "gate") if config is TINY else 0
    with use_backend("eager"):
        assert total(work).flops - unknown == counted(lambda: engine.decode(z, text=text))


def test_the_family_counts():
    family = family_of(TINY)
    assert family.decode_work(batch=2, hoisted=False) == decode_work(TINY, batch=2, hoisted=False)
    assert (
        total(family.decode_work(cfg_scale=2.0, steps=3)).flops > 1.9 * total(family.decode_work(steps=3)).flops / 1.05
    )
    with pytest.raises(InputError, match="no encoder"):
        family.encode_work()
    assert Tokenizer.from_config(TINY).config == TINY
