"""SSDD with the extension's convolutions: the eager sampler up to rounding, recorded as a program, and the same bits in
every batch."""

from dataclasses import replace

import pytest
import torch

from msdd_fast import Tokenizer, accelerate, explain
from msdd_fast.backends import extension_status
from msdd_fast.engine.batching import Chunk
from msdd_fast.layers.convolution import Fused, Separate, channels_last, repeated
from msdd_fast.layers.request import WHOLE
from msdd_fast.ops._patches import to_uint8
from tests.families.ssdd.test_engine import FLOAT32, SMALLEST, TINY, latents
from tests.families.ssdd.test_ssdd import random_tokenizer
from tests.reference import reference

pytestmark = [
    pytest.mark.skipif(not extension_status()[0], reason=extension_status()[1]),
    pytest.mark.usefixtures("native"),
]


@pytest.fixture
def native(monkeypatch):
    """Whatever this machine's level."""
    monkeypatch.setenv("MSDD_FAST_NATIVE_LINEAR", "1")


@pytest.fixture(scope="module")
def tok():
    return random_tokenizer()


@pytest.mark.parametrize("sides", [(8, 8), (3, 5), (9, 4)])
@pytest.mark.parametrize("steps", [1, 3])
def test_float32(tok, steps, sides):
    z = latents(3, 4, *sides)
    engine = accelerate(tok, dtype=torch.float32, steps=steps, batch_sizes=2)
    expected = reference(tok, z, 7, steps)
    assert (engine.decode(z, 7) - expected).abs().max() < FLOAT32
    assert engine.graphs, engine.graphs_reason
    noise = [latents(3, 3, 8 * sides[0], 8 * sides[1], seed=1)]
    assert (engine.decode(z, noise=noise) - reference(tok, z, noise=noise, steps=steps)).abs().max() < FLOAT32


@pytest.mark.parametrize("config", [SMALLEST, replace(TINY, factor=16)])
def test_other_sizes(config):
    """One pixel under the transformer, groups of odd sizes; cells of two tokens."""
    tok, z = random_tokenizer(config, seed=1), latents(2, 4, 1, 2)
    engine = accelerate(tok, dtype=torch.float32, steps=2)
    assert (engine.decode(z, 3) - reference(tok, z, 3, 2)).abs().max() < FLOAT32
    assert engine.graphs, engine.graphs_reason


def test_bfloat16_errs_no_more_than_eager(tok, monkeypatch):
    monkeypatch.setenv("MSDD_FAST_CPU_BF16", "1")
    z = latents(2, 4, 8, 8)
    exact = reference(tok, z, 7, 2)
    low = Tokenizer.from_config(tok.config).to(torch.bfloat16)
    low.load_state_dict(tok.state_dict())
    engine = accelerate(low, dtype=torch.bfloat16, steps=2)
    error = (engine.decode(z, 7) - exact).square().mean().sqrt()
    assert 1e-4 < error <= 2 * (reference(low, z, 7, 2) - exact).square().mean().sqrt()


def test_bits_are_those_of_any_batch_and_of_no_program(tok):
    z = latents(8, 4, 8, 6)
    recorded, plain = (accelerate(tok, dtype=torch.float32, steps=2, graphs=g) for g in ("auto", False))
    seeds = list(range(8))
    images = recorded.decode(z, seeds)
    assert torch.equal(images, recorded.decode(z, seeds)) and torch.equal(images, plain.decode(z, seeds))
    for i in (0, 5):
        assert torch.equal(recorded.decode(z[i : i + 1], seeds[i]), images[i : i + 1])
    assert recorded._cache.chunks(8, True) == [Chunk(8, 8)]


def test_bytes_and_streams(tok):
    engine, z = accelerate(tok, dtype=torch.float32), latents(2, 4, 4, 6)
    images = engine.decode(z, 5)
    as_bytes = engine.decode(z, 5, out_dtype=torch.uint8)
    assert engine.graphs and torch.equal(as_bytes, to_uint8(images)) and as_bytes.is_contiguous()
    (stage,) = engine.stream(z, 5, out_dtype=torch.uint8)
    assert torch.equal(stage.images, as_bytes)


def test_what_is_reported(tok, monkeypatch):
    report = accelerate(tok, dtype=torch.float32, steps=2).report()
    assert "51 convolutions of the extension: MSDD_FAST_NATIVE_LINEAR=1" in str(report)
    told = {c.op: (c.backend, c.calls) for c in explain(tok, 1, torch.float32, steps=2).ops}
    assert told == {c.op: (c.backend, c.calls) for c in report.ops}
    monkeypatch.setenv("MSDD_FAST_NATIVE_LINEAR", "0")
    engine = accelerate(tok, dtype=torch.float32)
    assert isinstance(engine.program.network.w.out, Separate) and not engine.graphs


def test_parts_spare_nothing_and_tiles_do(tok):
    engine = accelerate(tok, dtype=torch.float32)
    assert isinstance(engine.program.network.w.out, Fused)
    request = engine.request(latents(1, 4, 64, 64))
    ways = engine.program.ways(request)
    assert ways[0] == WHOLE and all(way.tile for way in ways[1:]) and len(ways) > 1


def test_repeated_is_nearest():
    x = latents(2, 3, 4, 5)
    for layout in (x, channels_last(x)):
        out = repeated(layout, 3)
        assert torch.equal(out, torch.nn.functional.interpolate(x, scale_factor=3, mode="nearest"))
        assert out.is_contiguous(memory_format=torch.channels_last)
