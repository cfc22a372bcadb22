"""What callers have set or hand over: it changes nothing, works, or is refused with one clear error."""

import copy
import pickle
import subprocess
import sys
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

from msdd_fast import Tokenizer, accelerate, explain
from msdd_fast.errors import CheckpointError, InputError
from msdd_fast.families import get_preset
from msdd_fast.sampling import sample
from tests.conftest import ROOT
from tests.engine.test_parity import latents

SSDD_LATENTS = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=["tiny", "tiny, predicting images", "tiny-ssdd"])
def model(request):
    """(tokenizer, latents)"""
    torch.manual_seed(0)
    config = get_preset(request.param.partition(",")[0])
    if "," in request.param:
        config = replace(config, decoder=replace(config.decoder, prediction="image"))
    tokenizer = Tokenizer.from_config(config)
    return tokenizer, SSDD_LATENTS if request.param == "tiny-ssdd" else latents(tokenizer, 2)


@pytest.fixture(scope="module")
def engine(cross):
    return accelerate(cross, dtype=torch.float32, batch_sizes=(2,))


# --- What the caller has set. ---


@pytest.fixture
def default_dtype():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
def test_autocast_has_no_influence(model, autocast):
    tokenizer, z = model
    usual = accelerate(tokenizer, dtype=torch.float32)
    expected, states = usual.decode(z, 3), [s.images for s in usual.stream(z, 3)]
    with torch.autocast("cpu", dtype=autocast):
        for engine in (usual, accelerate(tokenizer, dtype=torch.float32)):
            assert torch.equal(engine.decode(z, 3), expected)
            for piece, images in zip(engine.stream(z, 3), states, strict=True):
                assert torch.is_autocast_enabled("cpu")
                assert torch.equal(piece.images, images)
            assert torch.equal(torch.cat(list(engine.decode_many([z], 3))), expected)
        engine.warmup()
        assert engine.report().accuracy and explain(tokenizer, 1).ops
    assert torch.equal(engine.decode(z, 3), expected)


def test_default_dtype_and_device_have_no_influence(model, default_dtype):
    tokenizer, z = model
    torch.set_default_dtype(torch.float32)
    usual = accelerate(tokenizer, dtype=torch.float32)
    expected, eager = usual.decode(z, 3), tokenizer.decode(z, 3)
    torch.set_default_dtype(torch.float64)
    with torch.device("meta"):
        for engine in (usual, accelerate(tokenizer, dtype=torch.float32)):
            assert torch.equal(engine.decode(z, 3), expected)
            assert torch.equal(list(engine.stream(z, 3))[-1].images, expected)
            engine.warmup()
            assert engine.report().ops
        assert torch.equal(tokenizer.decode(z, 3), eager)


def test_the_fast_tier_neither(cross, default_dtype):
    torch.set_default_dtype(torch.float32)
    options = dict(tier="fast", dtype=torch.float32, max_psnr_loss=60.0, calibration=latents(cross, 2))
    expected = accelerate(cross, **options).decode(latents(cross, 2))
    torch.set_default_dtype(torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.device("meta"):
        assert torch.equal(accelerate(cross, **options).decode(options["calibration"]), expected)


def test_an_engine_made_in_inference_mode_is_one_for_every_mode(model):
    tokenizer, z = model
    expected = accelerate(tokenizer, dtype=torch.float32).decode(z)
    with torch.inference_mode():
        engine = accelerate(tokenizer, dtype=torch.float32)
        assert torch.equal(engine.decode(z.clone()), expected)
    assert torch.equal(engine.decode(z), expected)
    out = torch.empty_like(expected)
    assert torch.equal(engine.decode(z.clone().requires_grad_(), out=out), expected) and not out.requires_grad


def test_deterministic_mode(model):
    tokenizer, z = model
    engine = accelerate(tokenizer, dtype=torch.float32)
    expected = engine.decode(z)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.equal(engine.decode(z), expected)
    finally:
        torch.use_deterministic_algorithms(False)


# --- Tracing. ---


class Decode(torch.nn.Module):
    def __init__(self, tokenizer):
        super().__init__()
        self.tokenizer = tokenizer

    def forward(self, z):
        return sample(self.tokenizer.decoder, z, self.tokenizer.schedule, seed=5)


@torch.no_grad()
def test_export_of_sample(model):
    tokenizer, z = model
    exported = torch.export.export(Decode(tokenizer), (torch.zeros_like(z),)).module()
    assert torch.equal(exported(z), tokenizer.decode(z, 5, steps=1))


@torch.no_grad()
def test_compile_of_decode_in_one_graph(model):
    tokenizer, z = model
    torch._dynamo.reset()
    compiled = torch.compile(tokenizer.decode, fullgraph=True, backend="eager")
    assert torch.equal(compiled(z, 5), tokenizer.decode(z, 5))


@pytest.mark.filterwarnings("ignore:Converting a tensor", "ignore:.*torch.jit", "ignore:torch.tensor results", "ignore")
@torch.no_grad()
def test_jit_trace_of_the_decoder(model):
    tokenizer, z = model
    x, t = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)), torch.tensor([0.5, 0.5])
    traced = torch.jit.trace(tokenizer.decoder, (x, t, z), check_trace=False)
    for scale in (1.0, 0.5):
        expected = tokenizer.decoder(x * scale, t, z * scale)
        assert (traced(x * scale, t, z * scale) - expected).abs().max() < 1e-5


@torch.no_grad()
def test_jit_trace_of_an_engine(engine, cross):
    with pytest.raises(InputError, match=r"a FastDecoder cannot be recorded by torch\.jit\.trace"):
        torch.jit.trace(engine.decode, (latents(cross, 2),), check_trace=False)


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_compile_round_an_engine(engine, cross):
    torch._dynamo.reset()
    z = latents(cross, 2)
    assert torch.equal(torch.compile(lambda z: engine.decode(z, 3) * 2, backend="eager")(z), engine.decode(z, 3) * 2)


# --- What the caller hands over. ---

SEEDS = [3, np.int64(3), np.uint32(3), np.array(3), torch.tensor(3), [3, 4], (np.int64(3), 4), np.array([3, 4]),
         torch.tensor([3, 4], dtype=torch.uint64), range(3, 5), [torch.tensor(3), 4]]  # fmt: skip


@pytest.mark.parametrize("seed", SEEDS, ids=[f"{type(s).__name__} {s}" for s in SEEDS])
def test_integers_are_integers(engine, cross, seed):
    z = latents(cross, 2)
    assert torch.equal(engine.decode(z, seed), engine.decode(z, [3, 4]))
    assert torch.equal(cross.decode(z, seed), cross.decode(z, [3, 4]))


def test_numbers_are_numbers(cross):
    z = latents(cross, 1)
    options = dict(dtype=torch.float32, steps=np.int64(2), cfg_scale=np.float32(1.5), batch_sizes=np.int32(2))
    engine = accelerate(cross, **options, max_memory=np.int64(10**10))
    assert (engine.steps, engine.cfg_scale, engine.batch_sizes) == (2, 1.5, (2,))
    assert type(engine.steps) is int and type(engine.cfg_scale) is float
    expected = engine.decode(z, cfg_scale=2.0)
    assert torch.equal(engine.decode(z, cfg_scale=torch.tensor(2.0)), expected)
    assert torch.equal(next(engine.decode_many([z], np.int64(0), cfg_scale=np.float64(2))), expected)
    assert (cross.decode(z, steps=np.int64(2), cfg_scale=torch.tensor(2.0)) - expected).abs().max() < 1e-4
    assert accelerate(cross, batch_sizes=8).batch_sizes == (8,)
    assert accelerate(cross, batch_sizes=np.array([8, 2])).batch_sizes == (2, 8)


def odd_latents():
    z = torch.zeros(2, 16, 32)
    yield z.to_sparse(), "z must be a dense tensor, got the layout torch.sparse_coo"
    yield z.flatten(1).to_sparse_csr(), "z must be a dense tensor, got the layout torch.sparse_csr"
    yield torch.nested.nested_tensor([z[0], z[0, :8]]), "z must be a dense tensor, got a nested one"
    yield z.to("meta"), "z must hold data, got a tensor on the meta device"
    yield z.to(torch.float8_e4m3fn), "z must be float32, bfloat16, float16 or float64, got torch.float8_e4m3fn"
    yield z.to(torch.complex64), "z must be floating point, got torch.complex64"
    yield torch.quantize_per_tensor(z, 0.1, 0, torch.qint8), "z must be a floating point tensor, got a quantised one"
    if torch.backends.mkldnn.is_available():
        yield z.to_mkldnn(), "z must be a dense tensor, got the layout torch._mkldnn"
    for other in (None, z.numpy(), "z", 3, iter([z]), [z]):
        yield other, f"z must be a torch.Tensor, got {type(other).__name__}"


@pytest.mark.filterwarnings("ignore")
def test_latents_of_a_wrong_kind(engine, cross):
    for z, message in odd_latents():
        for call in (engine.decode, engine.stream, engine, cross.decode, lambda z: next(engine.decode_many([z]))):
            with pytest.raises(InputError, match=message):
                call(z)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": torch.zeros(2, dtype=torch.int64).to_sparse()}, "seed must be an integer tensor, got"),
        ({"seed": torch.zeros(2, dtype=torch.int64, device="meta")}, "seed must be an integer tensor, got .*meta"),
        ({"seed": torch.zeros(1, 2, dtype=torch.int64)}, "seed must be an int or 2 ints, got Tensor"),
        ({"seed": np.array([1.0, 2.0])}, "seed must be an int or 2 ints, got ndarray"),
        ({"seed": np.bool_(True)}, "seed must be an int or 2 ints, got bool"),
        ({"seed": b"ab"}, "seed must be an int or 2 ints, got bytes"),
        ({"seed": (i for i in (1, 2))}, "seed must be an int or 2 ints, got generator"),
        ({"seed": None}, "seed must be an int or 2 ints, got NoneType"),
        ({"seed": [1, "2"]}, "seed must be an int or 2 ints, got an item '2'"),
        ({"cfg_scale": "1.5"}, "cfg_scale must be a finite number >= 0, got '1.5'"),
        ({"cfg_scale": [1.5]}, "cfg_scale must be a finite number >= 0"),
        ({"cfg_scale": torch.ones(2)}, "cfg_scale must be a finite number >= 0, got Tensor of shape"),
        ({"cfg_scale": 1j}, "cfg_scale must be a finite number >= 0"),
        ({"noise": np.zeros((4, 2, 3, 8, 8))}, "noise must be a list of 4 tensors, one per stage, got ndarray"),
        ({"noise": (n for n in ())}, "noise must be a list of 4 tensors, one per stage, got generator"),
        ({"noise": torch.zeros(4)}, "noise must be a list of 4 tensors, one per stage, got Tensor"),
        ({"noise": [np.zeros((2, 3, 8, 8))] * 4}, r"noise\[0\] must be a torch.Tensor, got ndarray"),
        ({"noise": [torch.zeros(2, 3, 8, 8).int()] * 4}, r"noise\[0\] must be floating point, got torch.int32"),
        ({"noise": [torch.zeros(2, 3, 8, 8).to_sparse()] * 4}, r"noise\[0\] must be a dense tensor"),
    ],
)
def test_other_arguments_of_a_wrong_kind(engine, cross, arguments, message):
    for call in (engine.decode, cross.decode):
        with pytest.raises(InputError, match=message):
            call(torch.zeros(2, 16, 32), **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": "2"}, "steps must be an integer >= 1, got '2'"),
        ({"steps": 2.0}, "steps must be an integer >= 1, got 2.0"),
        ({"cfg_scale": "x"}, "cfg_scale must be a finite number >= 0, got 'x'"),
        ({"batch_sizes": "8"}, "batch_sizes must be integers >= 1, got '8'"),
        ({"batch_sizes": 8.0}, "batch_sizes must be integers >= 1, got 8.0"),
        ({"batch_sizes": b"8"}, "batch_sizes must be integers >= 1"),
        ({"batch_sizes": None, "max_memory": "1GB"}, "max_memory must be an integer >= 1, got '1GB'"),
        ({"dtype": "float32"}, "dtype must be float32, bfloat16 or float16, got 'float32'"),
        ({"dtype": None}, "dtype must be float32, bfloat16 or float16, got None"),
        ({"tier": ["exact"]}, "tier must be one of exact, fast"),
        ({"graphs": torch.ones(2)}, "graphs must be 'auto', True or False"),
        ({"backend": None}, "backend must be a name, .*, got NoneType"),
        ({"backend": 3}, "backend must be a name, .*, got int"),
        ({"backend": ["cpu"]}, "backend must be a name, .*, got list"),
        ({"validate": "yes"}, "validate must be True or False, got 'yes'"),
        ({"max_psnr_loss": "x"}, "max_psnr_loss must be a finite number >= 0, got 'x'"),
        ({"dtype": torch.float64}, "dtype must be float32, bfloat16 or float16, got torch.float64"),
        ({"tier": "slow"}, "tier must be one of exact, fast, got 'slow'"),
        ({"backend": "cuda9"}, "backend must be one of auto, .*, got 'cuda9'"),
        ({"backend": "auto,flux=cpu"}, "backend is chosen for the op 'flux'; known: "),
        ({"steps": 0}, "steps must be an integer >= 1, got 0"),
        ({"cfg_scale": -1.0}, "cfg_scale must be a finite number >= 0, got -1.0"),
        ({"batch_sizes": ()}, r"batch_sizes must be integers >= 1, got \(\)"),
        ({"batch_sizes": (0, 8)}, r"batch_sizes must be integers >= 1, got \(0, 8\)"),
        ({"graphs": "yes"}, "graphs must be 'auto', True or False, got 'yes'"),
        ({"max_memory": 1000}, r"max_memory must be at least \d+ bytes .*, got 1000"),
    ],
)
def test_bad_arguments_of_accelerate(cross, arguments, message):
    with pytest.raises(InputError, match=message):
        accelerate(cross, **arguments)


def test_a_tokenizer_may_be_named():
    assert accelerate("msdd-nano").family.model == accelerate(Tokenizer.from_pretrained("msdd-nano")).family.model
    assert explain("msdd-nano", 1).ops
    with pytest.raises(CheckpointError):
        accelerate("./no-such-checkpoint")
    for wrong in (None, 3, torch.nn.Linear(1, 1), Tokenizer):
        with pytest.raises(InputError, match="tokenizer must be a Tokenizer or the name of one, got"):
            accelerate(wrong)
    with torch.device("meta"):
        empty = Tokenizer.from_config("tiny")
    for call in (accelerate, explain):
        with pytest.raises(InputError, match="tokenizer must have its weights on a CPU or a GPU, got the meta device"):
            call(empty)


# --- The engine as an object. ---


def test_an_engine_is_shown_and_called(engine, cross):
    z = latents(cross, 2)
    text = repr(engine)
    assert text.startswith("FastDecoder(") and "float32 on cpu" in text and "batch_sizes=(2,)" in text
    assert torch.equal(engine(z, 3), engine.decode(z, 3))


def test_steps_of_a_call_are_those_of_the_engine(engine, cross):
    z = latents(cross, 1)
    assert torch.equal(engine.decode(z, steps=engine.steps), engine.decode(z))
    more = engine.steps + 1
    for call in (engine.decode, engine.stream, lambda z, steps: engine.decode_many([z], steps=steps)):
        with pytest.raises(InputError, match=rf"steps must be {engine.steps}, .* use accelerate\(.*steps={more}\)"):
            call(z, steps=more)


@pytest.mark.parametrize("send", [pickle.dumps, copy.copy, copy.deepcopy])
def test_an_engine_is_not_sent(engine, send):
    with pytest.raises(InputError, match="neither pickled nor copied: send the Tokenizer, and call accelerate"):
        send(engine)


def test_a_tokenizer_says_where_it_is_and_is_called(cross):
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert cross.device == torch.device("cpu") and cross.dtype == torch.float32
    assert torch.equal(cross(images, 3), cross.decode(cross.encode(images), 3))


# --- Nothing, NaN, sizes, sources. ---


def test_a_stream_of_nothing(model):
    tokenizer, z = model
    engine = accelerate(tokenizer, dtype=torch.float32)
    shapes = [s.images.shape for s in engine.stream(z)]
    nothing = list(engine.stream(z[:0], out_dtype=torch.uint8))
    assert [(0, *s[1:]) for s in shapes] == [s.images.shape for s in nothing]
    assert all(s.images.dtype == torch.uint8 and s.state.dtype == torch.float32 for s in nothing)
    assert [s.stage for s in nothing] == list(range(len(shapes)))


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_images_of_nan_are_an_error_where_results_are_validated(model, out_dtype):
    tokenizer, z = model
    broken = copy.deepcopy(tokenizer)
    checked = accelerate(broken, dtype=torch.float32, validate=True)
    out = torch.empty(2, 3, 64, 64, dtype=out_dtype)
    expected = accelerate(broken, dtype=torch.float32).decode(z, out_dtype=out_dtype)
    assert torch.equal(checked.decode(z, out_dtype=out_dtype), expected)
    assert checked.decode(z, out_dtype=out_dtype, out=out) is out and torch.equal(out, expected)
    with torch.no_grad():
        for parameter in broken.decoder.parameters():
            parameter.fill_(float("nan"))
    engine = accelerate(broken, dtype=torch.float32, validate=True)
    for call in (engine.decode, lambda z, **options: list(engine.stream(z, **options))):
        with pytest.raises(InputError, match="z must decode to finite images, got NaN or Inf in those of item 0"):
            call(z, out_dtype=out_dtype)


def test_max_memory_holds_at_every_size():
    tokenizer = Tokenizer.from_config("tiny-ssdd")
    joined = (
        2 * 4 * 3 * 128 * 64 * 4
    )  # with room for the heap: where not all images run at once, they are copied to the result
    limit = joined + sum(accelerate(tokenizer, dtype=torch.float32, batch_sizes=(4,)).memory.values())
    engine = accelerate(tokenizer, dtype=torch.float32, batch_sizes=(4,), max_memory=limit)
    seen, decode = [], engine.program.decode
    engine.program.decode = lambda inputs, *rest: seen.append(inputs.z.shape) or decode(inputs, *rest)
    z = torch.randn(4, 4, 16, 8, generator=torch.Generator().manual_seed(0))
    free = accelerate(tokenizer, dtype=torch.float32, batch_sizes=(2,))
    assert torch.equal(engine.decode(z, 1), free.decode(z, 1))
    assert {s[0] for s in seen} == {2}  # twice the pixels: half the batch
    with pytest.raises(InputError, match=rf"max_memory must be at least \d+ bytes for z of shape .*, got {limit}"):
        engine.decode(torch.zeros(1, 4, 160, 160))
    with pytest.raises(InputError, match=rf"z must hold at most \d+ images to stream in max_memory={limit}, got 40"):
        engine.stream(z.repeat(10, 1, 1, 1))


def test_closing_does_not_wait_for_a_source_that_waits(engine, cross):
    waits, go_on = threading.Event(), threading.Event()

    def source():
        yield latents(cross, 1)
        waits.set()
        go_on.wait(60)
        raise AssertionError("nobody asked for more")

    images = engine.decode_many(source())
    next(images)
    assert waits.wait(10)
    closed = threading.Thread(target=images.close)
    closed.start()
    closed.join(5)
    assert not closed.is_alive()
    go_on.set()


def test_a_process_ends_in_the_middle_of_a_stream():
    """Python's end finds the thread that reads the source inside PyTorch, which would take the process down."""
    code = """
import os, random, sys, time
import torch
from tests.perturbed import perturbed
from msdd_fast import accelerate
torch.set_num_threads(1)
engine, a = accelerate(perturbed(), dtype=torch.float32), torch.randn(200, 200)

def source():
    while True:
        b = a
        for _ in range(20):
            b = torch.tanh(b @ a)
        yield b[:16, :32].reshape(1, 16, 32).clone()

engine.decode(next(source()))
codes = []
for _ in range(6):
    child = os.fork()
    if child == 0:
        stream = engine.decode_many(source())
        next(stream)
        time.sleep(random.random() * 0.02)
        sys.exit(0)
    codes.append(os.waitpid(child, 0)[1])
sys.exit(any(codes))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


class Mine(Exception):
    pass


@pytest.mark.parametrize("error", [Mine("x"), KeyboardInterrupt(), InputError("mine"), TypeError("mine")])
def test_an_exception_of_the_callers_own_code_passes_unchanged(engine, cross, error):
    def source():
        yield latents(cross, 1)
        raise error

    with pytest.raises(type(error)) as seen:
        list(engine.decode_many(source()))
    assert seen.value is error

    def callback(_):
        raise error

    with pytest.raises(type(error)) as seen:
        cross.decode(latents(cross, 1), stage_callback=callback)
    assert seen.value is error


def test_what_is_no_source(engine):
    for wrong in (None, 3, 1.5):
        with pytest.raises(InputError, match="latents must be an iterable of tensors, got"):
            engine.decode_many(wrong)
    with pytest.raises(InputError, match="seed must be an integer >= 0, got"):
        engine.decode_many([], [1])
