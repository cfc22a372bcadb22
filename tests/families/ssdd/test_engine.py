"""SSDD's exact tier is the eager sampler up to rounding, on any sides, and offers what every engine offers."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from msdd_fast import Tokenizer, accelerate, explain
from msdd_fast.backends import extension_status
from msdd_fast.engine.batching import Chunk
from msdd_fast.errors import BackendUnavailableError, InputError
from msdd_fast.families.ssdd.presets import SSDD_PRESETS
from msdd_fast.layers.convolution import UpsampleConvolution, channels_last
from msdd_fast.ops._patches import to_uint8
from tests.conftest import HAS_GPU
from tests.families.ssdd.test_ssdd import random_tokenizer
from tests.reference import noted_backends, reference

# float32: eager and engine differ in the order of sums only. Decoded values reach 8; the largest difference seen is
# 6e-6 (more groups of channels, larger maps or more steps do not change it).
FLOAT32 = 3e-5
TINY = SSDD_PRESETS["tiny-ssdd"]
# Smallest that has every part: one group, grid of 1 x 2 under the transformer, window larger than the grid.
SMALLEST = replace(TINY, decoder=replace(TINY.decoder, widths=(8, 8, 8, 24), mid_layers=1, heads=1, groups=4))


@pytest.fixture(scope="module")
def tok():
    return random_tokenizer()


@pytest.fixture(scope="module")
def f16():
    return random_tokenizer(replace(TINY, factor=16), seed=1)


def latents(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("sides", [(8, 8), (3, 5), (9, 4)])
@pytest.mark.parametrize("steps", [1, 4])
def test_float32(tok, on_device, steps, sides):
    tok, z = on_device(tok), on_device(latents(3, 4, *sides))
    limit = 10 * FLOAT32 if z.is_cuda else FLOAT32  # cuDNN may take another algorithm for each layout
    engine = accelerate(tok, dtype=torch.float32, steps=steps, batch_sizes=(2,))
    expected = reference(tok, z, 7, steps)
    assert (engine.decode(z, 7) - expected).abs().max() < limit
    assert (engine.decode(z[2:], 9) - expected[2:]).abs().max() < limit
    noise = [on_device(latents(3, 3, 8 * sides[0], 8 * sides[1], seed=1))]
    given = engine.decode(z, noise=noise)
    assert (given - reference(tok, z, noise=noise, steps=steps)).abs().max() < limit
    assert (given - expected).abs().max() > 0.1  # the noise matters


@pytest.mark.parametrize("sides", [(4, 4), (2, 3)])
def test_latents_of_a_sixteenth(f16, sides):
    """A token takes the modulation of the cell that it lies in."""
    z = latents(2, 4, *sides)
    engine = accelerate(f16, dtype=torch.float32, steps=2)
    assert (engine.decode(z, 3) - reference(f16, z, 3, 2)).abs().max() < FLOAT32


@pytest.mark.parametrize("backend", ["eager", "cpu", "triton"])
def test_every_backend(backend, monkeypatch):
    """Few channels and pixels, and no graph, which would be refused after a decode.

    Triton's interpreter, where there is no GPU, takes milliseconds for every program.
    """
    if backend == "cpu" and not extension_status()[0]:
        pytest.skip(extension_status()[1])
    device = "cuda" if backend == "triton" and HAS_GPU else "cpu"
    tok, z = random_tokenizer(SMALLEST).to(device), latents(1, 4, 1, 2).to(device)
    engine = accelerate(tok, dtype=torch.float32, backend=backend, steps=1, graphs=False)
    expected, taken = reference(tok, z, 3, 1), noted_backends(monkeypatch)
    assert (engine.decode(z, 3) - expected).abs().max() < FLOAT32
    assert all(taken[op] == {backend} for op in ("group_norm_modulate_silu", "window_attention", "norm_modulate"))


@pytest.mark.parametrize("steps", [1, 3])
def test_bfloat16_errs_no_more_than_eager(tok, on_device, steps, monkeypatch):
    monkeypatch.setenv("MSDD_FAST_CPU_BF16", "1")
    tok, z = on_device(tok), on_device(latents(2, 4, 8, 8))
    exact = reference(tok, z, 7, steps)
    low = on_device(Tokenizer.from_config(tok.config)).to(torch.bfloat16)
    low.load_state_dict(tok.state_dict())
    eager = reference(low, z.bfloat16(), 7, steps)
    engine = accelerate(low, dtype=torch.bfloat16, steps=steps)
    assert engine.dtype == torch.bfloat16
    error = (engine.decode(z, 7) - exact).square().mean().sqrt()
    assert error <= 2 * (eager - exact).square().mean().sqrt()
    assert error > 1e-4  # it really calculates in bfloat16


def test_without_bfloat16_instructions_it_calculates_in_float32(tok, monkeypatch):
    monkeypatch.setenv("MSDD_FAST_CPU_BF16", "0")
    engine = accelerate(tok, steps=1)
    z = latents(1, 4, 8, 8)
    assert engine.dtype == torch.float32
    assert (engine.decode(z) - reference(tok, z, steps=1)).abs().max() < FLOAT32
    assert str(explain(tok, 1)).startswith("float32 (this CPU has no fast bfloat16 matrix product)")


def test_bytes_out_and_streams(tok):
    engine = accelerate(tok, dtype=torch.float32, batch_sizes=(2,))
    z = latents(3, 4, 8, 6)
    images = engine.decode(z, 5)
    as_bytes = engine.decode(z, 5, out_dtype=torch.uint8)
    assert torch.equal(as_bytes, to_uint8(images)) and as_bytes.is_contiguous()
    out = torch.empty(3, 3, 64, 48, dtype=torch.uint8)
    assert engine.decode(z, 5, out_dtype=torch.uint8, out=out) is out and torch.equal(out, as_bytes)
    (stage,) = engine.stream(z, 5, out_dtype=torch.uint8)
    assert (stage.state - images).abs().max() < FLOAT32 and stage.images.dtype == torch.uint8
    many = list(engine.decode_many([z[:1], z[1:]], 5))
    assert [len(x) for x in many] == [1, 2] and (torch.cat(many) - images).abs().max() < FLOAT32
    assert engine.decode(z[:0]).shape == (0, 3, 64, 48)


def test_report_and_explain(tok):
    engine = accelerate(tok, dtype=torch.float32, steps=2)
    report = engine.report()
    assert "SSDD" in report.model and report.sampling == "2 step(s), no guidance"
    assert report.accuracy[0].max_abs < FLOAT32
    calls = {c.op: c.calls for c in report.ops}
    # Per step: two norms for each of 20 residual blocks, two more; a norm for each half of the transformer's blocks.
    assert calls["group_norm_modulate_silu"] == 2 * 42 and calls["window_attention"] == 2 * 2
    assert calls["norm_modulate"] == 2 and calls["gate_residual_norm_modulate"] == 2 * 3
    # The sums at the end of the transformer are steps of 1.
    assert calls["start_noise"] == 1 and calls["euler_step"] == 2 + 2 * 2
    assert calls["swiglu"] == 1 and calls["geglu"] == 2 * 2
    assert "residual block" in str(report)
    told = {c.op: (c.backend, c.calls) for c in explain(tok, 1, torch.float32, steps=2).ops}
    assert told == {c.op: (c.backend, c.calls) for c in report.ops}


def test_weights_of_time_and_latents_are_packed_once(tok, monkeypatch):
    """Every parameter of the decoder is in the weights or the tables, but for the matrices of time."""
    monkeypatch.setenv("MSDD_FAST_NATIVE_LINEAR", "0")  # whose layout is padded
    engine = accelerate(tok, dtype=torch.float32, steps=1)
    time = sum(p.nbytes for n, p in tok.decoder.named_parameters() if "time" in n)
    norms = sum(p.nbytes for n, p in tok.decoder.named_parameters() if "norm" in n and p.ndim == 1)
    upsampling = sum(m.conv.weight.nbytes for level in tok.decoder.up_blocks for m in level.upsamplers)
    shortcuts = sum(p.nbytes for n, p in tok.decoder.named_parameters() if n.endswith("conv_shortcut.bias"))
    biases = sum(p.nbytes for n, p in tok.decoder.named_parameters() if "norm1" in n and n.endswith("bias"))
    total = sum(p.nbytes for p in tok.decoder.parameters())
    # A 4 x 4 kernel for a 3 x 3 one; shortcuts' biases are added to others.
    assert engine.memory["weights"] == total - time - (norms - biases) - shortcuts + upsampling * 7 // 9
    assert engine.memory["tables"] == 2 * 4 * sum(r.out_channels for r in _second_convolutions(tok))


def _second_convolutions(tok):
    return [r.conv2 for level in (*tok.decoder.down_blocks, *tok.decoder.up_blocks) for r in level.resnets]


def test_training_the_tokenizer_later_does_not_change_the_engine(tok):
    mine = random_tokenizer()
    engine = accelerate(mine, dtype=torch.float32, steps=1)
    z = latents(1, 4, 8, 8)
    before = engine.decode(z)
    with torch.no_grad():
        for p in mine.parameters():
            p.zero_()
    assert torch.equal(engine.decode(z), before)


def test_graphs_are_kept_by_shape(tok, monkeypatch):
    """With fake graphs: two heights are two graphs, batches are put together as for any engine."""
    monkeypatch.setattr("msdd_fast.engine.graph_cache.records_programs", lambda device: False)
    engine = accelerate(tok, dtype=torch.float32, steps=1, batch_sizes=(1, 2))
    made = []

    class Padded:
        def __init__(self, request):
            self.request = request

        def replay(self, inputs, out):
            shape = self.request.shape
            assert (len(inputs.z), *inputs.z.shape[1:]) <= shape
            padded = torch.cat([inputs.z, torch.zeros(shape[0] - len(inputs.z), *shape[1:])])
            seeds = torch.cat([inputs.seeds, torch.zeros(shape[0] - len(inputs.seeds), dtype=torch.int64)])
            full = inputs._replace(z=padded, seeds=seeds)
            return out.copy_(engine.program.decode(full, self.request)[: len(inputs.z)])

    def get(request):
        made.append(request.shape)
        return Padded(request)

    monkeypatch.setattr(engine._cache, "enabled", True)
    monkeypatch.setattr(engine._cache, "get", get)
    monkeypatch.setattr(engine._cache, "_cost", {1: 1.0, 2: 1.5})
    for sides in ((8, 8), (4, 8)):
        z = latents(3, 4, *sides)
        assert (engine.decode(z, 2) - reference(tok, z, 2, 1)).abs().max() < FLOAT32
    assert engine._cache.chunks(3, True) == [Chunk(2, 2), Chunk(1, 1)]
    assert made == [(2, 4, 8, 8), (1, 4, 8, 8), (2, 4, 4, 8), (1, 4, 4, 8)]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda t: accelerate(t, cfg_scale=2.0), InputError, "cfg_scale must be 1 for an SSDD tokenizer"),
        (lambda t: explain(t, cfg_scale=2.0), InputError, "cfg_scale must be 1 for an SSDD tokenizer"),
        (lambda t: accelerate(t, steps=0), InputError, "steps must be an integer >= 1, got 0"),
        (
            lambda t: accelerate(t, tier="fast"),
            BackendUnavailableError,
            "tier='fast' cannot be had: SSDD's products are",
        ),
        (lambda t: accelerate(t).decode(latents(1, 128, 32)), InputError, r"z must have shape \(B, 4, h, w\), got"),
        (lambda t: accelerate(t).decode(latents(1, 4, 8, 8), cfg_scale=2.0), InputError, "cfg_scale must be 1"),
        (
            lambda t: accelerate(t).decode(latents(1, 4, 8, 8), noise=[latents(1, 3, 64, 72)]),
            InputError,
            r"noise\[0\] must have shape \(1, 3, 64, 64\), got \(1, 3, 64, 72\)",
        ),
        (lambda t: accelerate(t, max_memory=1000), InputError, "max_memory must be at least"),
    ],
)
def test_errors(tok, call, error, message):
    with pytest.raises(error, match=message):
        call(tok)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_upsampling_convolution_is_exact(dtype):
    """Also at the border, which the padding of the large map makes special."""
    x, weight, bias = latents(2, 5, 4, 7), latents(6, 5, 3, 3, seed=1), latents(6, seed=2)
    expected = F.conv2d(F.interpolate(x, scale_factor=2.0), weight, bias, padding=1)
    upsample = UpsampleConvolution(weight, bias.to(dtype))
    out = upsample(channels_last(x.to(dtype)))
    assert out.is_contiguous(memory_format=torch.channels_last)
    limit = 2e-5 if dtype == torch.float32 else 2.0**-8 * 4 * 45**0.5 * 4
    assert (out.float() - expected).abs().max() < limit
    assert upsample.memory() == (6 * 5 * 16 + 6) * dtype.itemsize
