"""PiD's engine is the eager sampler up to rounding: sizes, batches, chunks, samplers, dtypes, memory, graphs."""

import weakref
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from msdd_fast import Tokenizer, accelerate, explain
from msdd_fast.backends import extension_status
from msdd_fast.errors import BackendUnavailableError, InputError
from msdd_fast.families.pid.engine.memory import activation_bytes, bytes_per_row, chunk_rows
from msdd_fast.families.pid.presets import PID_PRESETS
from msdd_fast.layers.request import Request, Way
from msdd_fast.ops._patches import to_uint8
from tests.conftest import HAS_GPU
from tests.families.pid.models import TINY, captions, latents, random_tokenizer
from tests.reference import reference

# float32: eager and engine differ in the order of sums only; decoded values reach 5. The largest seen is 5e-6.
FLOAT32 = 3e-5
V1 = replace(TINY, features=replace(TINY.features, gate="channel", padding="zeros", pixel_injection=False))
FLUX2 = replace(TINY, latents="flux2", features=replace(TINY.features, unpatchify=2, interval=1))
CONFIGS = {"v1": V1, "v15": TINY, "flux2": FLUX2}
# Smallest that has every part: Triton's interpreter, where there is no GPU, takes milliseconds for every program.
SMALLEST = replace(
    TINY,
    image_size=32,
    decoder=replace(TINY.decoder, depth=2, pixel_depth=1, text_length=4),
    features=replace(TINY.features, blocks=1, interval=1),
)


@pytest.fixture(scope="module")
def tok():
    return random_tokenizer()


def given(batch, config=TINY, rows=7):
    return {"text": captions(batch, config, rows), "sigma": [0.4 * i / batch for i in range(batch)]}


@pytest.mark.parametrize(
    ("name", "batch", "sides"),
    [("v1", 1, (1, 1)), ("v1", 3, (1, 2)), ("v15", 1, (2, 2)), ("v15", 3, (1, 2)), ("flux2", 2, (1, 1))],
)
def test_float32(name, batch, sides, on_device):
    config = CONFIGS[name]
    tok = on_device(random_tokenizer(config))
    z, conditions = on_device(latents(batch, config.latent_channels, *sides)), given(batch, config)
    engine = accelerate(tok, dtype=torch.float32, steps=2)
    limit = 10 * FLOAT32 if z.is_cuda else FLOAT32
    expected = reference(tok, z, 7, 2, **conditions)
    whole = engine.decode(z, 7, **conditions)
    assert (whole - expected).abs().max() < limit
    engine.program.network.chunk = 5  # does not divide the rows
    assert (engine.decode(z, 7, **conditions) - whole).abs().max() < limit


def test_explicit_noise_and_size(tok):
    z, conditions = latents(2, 4, 2, 2), given(2)
    noise = [latents(2, 3, 48, 80, seed=i) for i in range(2)]
    size = {"height": 48, "width": 80}
    engine = accelerate(tok, dtype=torch.float32, steps=2)
    expected = reference(tok, z, steps=2, noise=noise, **size, **conditions)
    images = engine.decode(z, noise=noise, **size, **conditions)
    assert images.shape == (2, 3, 48, 80) and (images - expected).abs().max() < FLOAT32
    with pytest.raises(InputError, match=r"noise must hold 2 tensors"):
        engine.decode(z, noise=noise[:1], **size, **conditions)


@pytest.mark.parametrize("changes", [{"sampler": "ode"}, {"sampler": "dpm", "shift": 6.0}])
def test_other_samplers(tok, changes):
    model = Tokenizer.from_stored(replace(TINY, **changes), tok.state_dict(), "")
    z, conditions = latents(2, 4, 2, 3), given(2)
    limit = FLOAT32
    if changes["sampler"] == "dpm":
        conditions |= {"null_text": captions(1, rows=4, seed=3), "cfg_scale": 2.0}
        limit = 2e-3  # divides by 1.7e-4
    engine = accelerate(model, dtype=torch.float32, steps=3, cfg_scale=conditions.get("cfg_scale"))
    assert (engine.decode(z, 1, **conditions) - reference(model, z, 1, 3, **conditions)).abs().max() < limit


def test_the_times_of_undistilled_weights_depend_on_the_size(tok):
    model = Tokenizer.from_stored(replace(TINY, sampler="dpm"), tok.state_dict(), "")
    engine = accelerate(model, dtype=torch.float32, steps=2)
    with pytest.raises(InputError, match=r"were made for .* set config.image_size or config.shift"):
        engine.decode(latents(1, 4, 2, 3), text=captions(1))
    assert engine.decode(latents(1, 4, 2, 2), text=captions(1)).isfinite().all()


@pytest.mark.parametrize("backend", ["eager", "cpu", "triton"])
def test_every_backend(backend):
    if backend == "cpu" and not extension_status()[0]:
        pytest.skip(extension_status()[1])
    device = "cuda" if backend == "triton" and HAS_GPU else "cpu"
    tok, z = random_tokenizer(SMALLEST).to(device), latents(1, 4, 1, 1).to(device)
    conditions = given(1, SMALLEST, 3)
    engine = accelerate(tok, dtype=torch.float32, backend=backend, steps=2)
    assert (engine.decode(z, 3, **conditions) - reference(tok, z, 3, 2, **conditions)).abs().max() < FLOAT32


@pytest.mark.parametrize("backend", ["eager", "cpu"])
@pytest.mark.parametrize(("batch", "sides", "rows"), [(1, (1, 1), 3), (3, (1, 2), 5)])
def test_backends_of_a_cpu(backend, batch, sides, rows, monkeypatch):
    """Square and not, batch 1 and 3, whole and in chunks of so many rows, float32 and bfloat16.

    Triton's interpreter is too slow for that.
    """
    if backend == "cpu" and not extension_status()[0]:
        pytest.skip(extension_status()[1])
    monkeypatch.setenv("MSDD_FAST_CPU_BF16", "1")
    tok, z, conditions = random_tokenizer(SMALLEST), latents(batch, 4, *sides), given(batch, SMALLEST, 3)
    exact = reference(tok, z, 3, 2, **conditions)
    low = Tokenizer.from_stored(SMALLEST, tok.state_dict(), "").to(torch.bfloat16)
    rounding = (reference(low, z.bfloat16(), 3, 2, **conditions) - exact).square().mean().sqrt()
    for chunk in (None, rows):
        for dtype in (torch.float32, torch.bfloat16):
            engine = accelerate(tok, dtype=dtype, backend=backend, steps=2)
            if chunk:
                engine.program.network.chunk = chunk  # does not divide all rows
            error = engine.decode(z, 3, **conditions) - exact
            if dtype == torch.float32:
                assert error.abs().max() < FLOAT32
            else:
                assert 1e-4 < error.square().mean().sqrt() <= 2 * rounding


@pytest.mark.parametrize("chunked", [False, True])
def test_bfloat16_errs_no_more_than_eager(tok, on_device, monkeypatch, chunked):
    monkeypatch.setenv("MSDD_FAST_CPU_BF16", "1")
    tok, z, conditions = on_device(tok), on_device(latents(2, 4, 2, 3)), given(2)
    exact = reference(tok, z, 7, **conditions)
    low = on_device(Tokenizer.from_config(tok.config)).to(torch.bfloat16)
    low.load_state_dict(tok.state_dict())
    eager = reference(low, z.bfloat16(), 7, **conditions)
    engine = accelerate(low, dtype=torch.bfloat16)
    assert engine.dtype == torch.bfloat16
    if chunked:
        engine.program.network.chunk = 7
    error = (engine.decode(z, 7, **conditions) - exact).square().mean().sqrt()
    assert error <= 2 * (eager - exact).square().mean().sqrt()
    assert error > 1e-4  # it really calculates in bfloat16


def test_bytes_out_streams_and_many(tok):
    engine = accelerate(tok, dtype=torch.float32, batch_sizes=(2,), steps=2)
    z, text = latents(3, 4, 1, 2), captions(1)
    images = engine.decode(z, 5, text=text)
    as_bytes = engine.decode(z, 5, text=text, out_dtype=torch.uint8)
    assert torch.equal(as_bytes, to_uint8(images)) and as_bytes.shape == (3, 3, 32, 64)
    (stage,) = engine.stream(z, 5, text=text)
    assert (stage.state - images).abs().max() < FLOAT32
    many = list(engine.decode_many([z[:1], z[1:]], 5, text=text))
    assert [len(x) for x in many] == [1, 2] and (torch.cat(many) - images).abs().max() < FLOAT32
    assert engine.decode(z[:0], text=text, height=16, width=48).shape == (0, 3, 16, 48)


def test_report_and_explain(tok):
    engine = accelerate(tok, dtype=torch.float32, batch_sizes=1)
    engine.warmup()
    report = engine.report()
    assert "PiD for sdxl latents" in report.model and report.sampling == "4 step(s), sde, no guidance"
    assert report.accuracy[0].max_abs < FLOAT32
    assert not engine.graphs and "convolutions of PiD's latents" in report.graphs
    calls = {c.op: c.calls for c in report.ops}
    # Per step: two attentions in each of 3 joint and 2 pixel blocks; 2 injections and the one before the pixels.
    assert calls["attention"] == 4 * 5 and calls["sigma_gate"] == 4 * 3 and calls["sde_step"] == 4
    assert calls["start_noise"] == 1 and calls["group_norm_modulate_silu"] == 2 * TINY.features.blocks
    told = {c.op: (c.backend, c.calls) for c in explain(tok, 1, torch.float32).ops}
    assert told == {c.op: (c.backend, c.calls) for c in report.ops}
    with pytest.raises(BackendUnavailableError, match="graphs=True cannot be had: the convolutions"):
        accelerate(tok, graphs=True)
    with pytest.raises(BackendUnavailableError, match="PiD's products have not been measured in 8 bits"):
        accelerate(tok, tier="fast")


def test_time_and_dead_weights_are_gone(tok, monkeypatch):
    monkeypatch.setenv("MSDD_FAST_NATIVE_LINEAR", "0")  # whose layout is padded
    monkeypatch.setattr("msdd_fast.families.pid.engine.weights.extension_status", lambda: (False, ""))
    engine = accelerate(tok, dtype=torch.float32)
    last, d = f"patch_blocks.{TINY.decoder.depth - 1}.", TINY.decoder.hidden_size
    left_out = 0
    for name, p in tok.decoder.named_parameters():
        time = "t_embedder" in name or "adaLN_modulation_" in name
        dead = name.startswith(last) and ("mlp_y" in name or "proj_y" in name)
        small = "norm" in name or "log_alpha" in name or ("pixel_blocks" in name and ".mlp." in name)
        small = small or ".block.0." in name or ".block.3." in name  # GroupNorms
        half = name.endswith("content_proj.weight")  # a vector: what of it is no matrix
        left_out += p.nbytes if time or dead or small else p.nbytes // 2 if half else 0
    left_out += 4 * d * d  # queries of the last block's caption
    assert engine.memory["weights"] == sum(p.nbytes for p in tok.decoder.parameters()) - left_out
    assert engine.memory["tables"] == 4 * 4 * (2 * 6 * TINY.decoder.depth + 1) * d


def test_graphs_are_kept_by_what_is_given(tok, monkeypatch):
    """With a fake recorder: a graph's key has the size of images and captions, and its buffers take new conditions."""
    engine = accelerate(tok, dtype=torch.float32, steps=1, batch_sizes=(2,))
    made = []

    class Graph:
        def __init__(self, request):
            self.request, self.inputs = request, engine._example(request)

        def replay(self, inputs, out=None):
            from msdd_fast.engine.graphs import fill

            fill(self.inputs, inputs)
            images = engine.program.decode(self.inputs, self.request)[: len(inputs.z)]
            return images if out is None else out.copy_(images)

    def get(request):
        made.append(request)
        return Graph(request)

    monkeypatch.setattr(engine._cache, "enabled", True)
    monkeypatch.setattr(engine._cache, "get", get)
    z = latents(2, 4, 1, 2)
    for extra in ({"text": captions(2, rows=7)}, {"text": captions(1, rows=3)}, {"text": captions(2), "height": 48}):
        expected = reference(tok, z, 2, 1, sigma=0.1, **extra)
        assert (engine.decode(z, 2, sigma=0.1, **extra) - expected).abs().max() < FLOAT32
    assert len(set(made)) == 3 and {r.size for r in made} == {(32, 64), (48, 64)}


def test_the_demo_family_takes_no_text():
    tok = Tokenizer.from_config("tiny")
    with pytest.raises(InputError, match="decode of an MSDD tokenizer takes no argument 'text'"):
        accelerate(tok).decode(torch.zeros(1, 16, 32), text=captions(1))


def test_released_sizes_are_planned():
    """4K in bfloat16: bounded by features and tokens, not by modulations of 3.2 GB per block."""
    config = replace(PID_PRESETS["pid-v15-flux"], image_size=4096)
    large, usual = (
        Request((1, 16, side // 32, side // 32), False, torch.float32, size=(side, side)) for side in (4096, 2048)
    )
    chunk = chunk_rows(config, 2)
    assert activation_bytes(config, large, 2, chunk, 0) < 7e9
    assert activation_bytes(config, usual, 2, chunk, 0) < 2.5e9
    assert activation_bytes(config, large._replace(way=Way(parts=16)), 2, chunk, 0) < 2.5e9


class Peak(TorchDispatchMode):
    """The most bytes that tensors hold at once which are made inside, or are weights; those ``known`` do not count."""

    def __init__(self, *known):
        super().__init__()
        self.live, self.now, self.peak = {t.untyped_storage()._cdata: 0 for t in known}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor) and t.untyped_storage()._cdata not in self.live:
                storage = t.untyped_storage()
                self.live[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.released, storage._cdata)
        return out

    def released(self, key):
        self.now -= self.live.pop(key, 0)


def test_pixel_blocks_take_memory_by_chunk_not_by_image():
    """Eager ops, which write the modulations of a chunk. What grows with the image are the patches' tokens."""
    dec = replace(TINY.decoder, pixel_width=16, depth=1, pixel_depth=1)
    engine = accelerate(
        random_tokenizer(replace(TINY, decoder=dec)), dtype=torch.float32, backend="eager,attention=sdpa", steps=1
    )
    network = engine.program.network

    @torch.no_grad()
    def peak(side, chunk):
        network.chunk = chunk
        context = network.context(latents(1, 4, side // 32, side // 32), torch.zeros(1), (side, side))
        s, p = latents((side // 16) ** 2, dec.hidden_size), network._embed_pixels(latents(1, 3, side, side), context)
        with Peak(s, p) as measured:
            network._pixel_block(network.w.pixels[0], p, s, context, 1)
        tokens = len(s) * dec.attention_width * 4 * 8
        return measured.peak - tokens

    row = bytes_per_row(engine.config, 4)
    small, large = peak(128, 16), peak(256, 16)
    assert abs(large - small) < 16 * row * 0.2  # four times the rows, the same chunk
    assert 48 * row * 0.3 < peak(256, 64) - large <= 48 * row
