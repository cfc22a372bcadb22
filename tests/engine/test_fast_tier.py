"""The fast tier: 8-bit linears, all or none of them, and a measured loss of picture quality.

torch._scaled_mm runs on the CPU as well, so the float8 engine does, once it is told that this is a GPU.
"""

import gc
import math
import weakref
from dataclasses import replace
from functools import partial

import pytest
import torch

from msdd_fast import Tokenizer, accelerate, ops
from msdd_fast.backends.extension import extension_status, load_extension
from msdd_fast.engine import decoder as fast_decoder
from msdd_fast.engine import tier
from msdd_fast.errors import AccuracyError, BackendUnavailableError, InputError
from msdd_fast.families import family_of, get_preset
from msdd_fast.layers.linear import fp8, int8
from msdd_fast.layers.linear.dense import DenseLinear
from msdd_fast.layers.linear.fp8 import Fp8Linear
from msdd_fast.layers.linear.int8 import OneDnnInt8Linear
from msdd_fast.metrics.image import psnr
from tests.engine.test_parity import latents
from tests.perturbed import perturbed

HAS_FP8 = torch.cuda.is_available() and fp8.available(torch.device("cuda"))[0]
NATIVE_INT8 = extension_status()[0] and load_extension().linear_int8_level() != "plain"
HAS_INT8 = int8.available()[0]
needs_int8 = pytest.mark.skipif(not HAS_INT8, reason=int8.available()[1])
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not HAS_FP8, reason="needs float8 on a GPU")]),
]


# Not in Triton's interpreter: slow, and its float8 is wrong.
FLOAT8 = {"tier": "fast", "backend": "auto,quantize_rows=eager"}


@pytest.fixture
def float8(monkeypatch):
    """float8 engines in bfloat16 on the CPU."""
    monkeypatch.setenv("MSDD_FAST_CPU_BF16", "1")
    monkeypatch.setattr(fp8, "available", lambda device: (True, "stand-in"))
    monkeypatch.setattr(tier, "_is_cpu", lambda device: False)


def matrices(rows, inputs, outputs, device="cpu"):
    generator = torch.Generator().manual_seed(inputs)
    x = torch.randn(rows, inputs, generator=generator)
    x *= torch.logspace(-2, 2, rows)[:, None]  # every row its own size
    w = torch.randn(outputs, inputs, generator=generator) * torch.logspace(-1, 1, outputs)[:, None] / inputs**0.5
    return (t.to(device, torch.bfloat16) for t in (x, w, torch.randn(outputs, generator=generator)))


def emulated(x, w, bias):
    """The scaled product of the quantised rows, in float64."""
    (qx, sx), (qw, sw) = (ops.quantize_rows(t, backend="eager") for t in (x, w))
    y = (qx.double() * sx.double()) @ (qw.double() * sw.double()).t()
    return y if bias is None else y + bias.double()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 16, 16), (37, 64, 48), (130, 768, 144)])
def test_fp8_linear_is_the_scaled_product_of_its_quantised_rows(device, with_bias, rows, inputs, outputs):
    x, w, bias = matrices(rows, inputs, outputs, device)
    bias = bias if with_bias else None
    linear = Fp8Linear(w, bias, quantize=partial(ops.quantize_rows, backend="eager"))
    y, expected = linear(x), emulated(x, w, bias)
    assert y.dtype == torch.bfloat16
    # Its own rounding, and the sum's: fast accumulation on a GPU keeps 13 bits of the partial sums of a row.
    largest = (x.double().abs() @ w.double().abs().t()) * 2**-12
    assert ((y.double() - expected).abs() <= 2**-8 * expected.abs() + largest).all()
    exact, product = x.double() @ w.double().t(), emulated(x, w, None)
    relative = (product - exact).norm(dim=1) / exact.norm(dim=1)
    assert 0.005 < relative.max() < 0.15  # it is 8 bits, and a small row is as good as a large one


@pytest.mark.parametrize("device", DEVICES)
def test_fp8_linear_writes_where_it_is_told(device):
    x, w, bias = matrices(5, 32, 48, device)
    linear = Fp8Linear(w, bias, quantize=partial(ops.quantize_rows, backend="eager"))
    expected = linear(x)
    for buffer, part in (
        (torch.zeros(9, 48, dtype=x.dtype, device=device), (slice(2, 7), slice(None))),
        (torch.zeros(5, 80, dtype=x.dtype, device=device), (slice(None), slice(16, 64))),
    ):
        out = buffer[part]
        assert linear(x, out=out) is out and torch.equal(out, expected)
        assert buffer.count_nonzero() == expected.count_nonzero()  # nothing else is touched
    assert linear.memory() == 32 * 48 + 4 * 48 + 2 * 48


@needs_int8
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 16, 16), (37, 64, 50), (130, 768, 144)])
def test_int8_linear(dtype, with_bias, rows, inputs, outputs):
    x, w, bias = (t.to(dtype) for t in matrices(rows, inputs, outputs))
    linear = OneDnnInt8Linear(w, bias if with_bias else None)
    y = linear(x)
    assert y.dtype == dtype
    amax, scale = x.float().abs().amax(dim=1, keepdim=True), w.float().abs().amax(dim=1, keepdim=True) / 127
    qx = torch.addcmul(torch.tensor(64.5), x.float(), 63 / amax).floor() - 64
    qw = (w.float() / scale).round()
    assert qx.abs().max() == 63 and qw.abs().max() == 127
    product = (qx.double() @ qw.double().t()) * amax.double() / 63 * scale.double().t()
    expected = product + bias.double() if with_bias else product
    rounding = 2**-8 if dtype == torch.bfloat16 else 2e-6
    assert ((y.double() - expected).abs() <= rounding * (expected.abs() + product.abs())).all()
    exact = x.double() @ w.double().t()
    assert ((product - exact).norm(dim=1) / exact.norm(dim=1)).max() < 0.05
    buffer = torch.zeros(rows, outputs + 7, dtype=dtype)
    linear(x, out=buffer[:, 3:-4])
    assert torch.equal(buffer[:, 3:-4], y)


@needs_int8
def test_int8_does_not_saturate_or_hide_nan():
    """The largest products of both signs: without VNNI two of them are added in 16 bits."""
    for sign in (1.0, -1.0):
        x, w = torch.ones(2, 256), torch.full((16, 256), sign)
        assert torch.equal(OneDnnInt8Linear(w, None)(x), torch.full((2, 16), 256 * sign))
    x[0, 0] = float("nan")
    assert OneDnnInt8Linear(w, None)(x).isnan().any(dim=1).tolist() == [True, False]


def test_the_expected_loss_is_that_of_independent_errors():
    """A made-up reconstruction of 25 dB and a made-up error of 40 dB."""
    generator = torch.Generator().manual_seed(0)
    original = torch.rand(1, 3, 256, 256, generator=generator) - 0.5
    exact = original + torch.randn(original.shape, generator=generator) * (4 / 10**2.5) ** 0.5 / 4
    error = torch.randn(original.shape, generator=generator) * 1e-2
    measured = float(psnr(exact, original) - psnr(exact + error, original))
    mse, mse_ref = float(error.square().mean()), float((exact - original).square().mean())
    assert 10 * math.log10(1 + mse / mse_ref) == pytest.approx(measured, rel=0.1)
    assert tier.expected_loss(4 / 10**2.5) == pytest.approx(10 * math.log10(2))
    assert tier.expected_loss(0.0) == 0.0
    assert tier.expected_loss(4e-4) == pytest.approx(10 * math.log10(1 + 10**-1.5))  # 40 dB: 0.135 dB


def nano():
    return Tokenizer.from_pretrained("msdd-nano")


@needs_int8
def test_int8_nano_is_within_the_limit():
    pytest.importorskip("skimage")
    tok = nano()
    engine = accelerate(tok, dtype=torch.float32, tier="fast")
    report = engine.report()
    eager, exact = report.accuracy
    assert exact.against == "exact tier, 4 encoded photographs" and exact.expected_loss < 0.05 and exact.psnr > 45
    assert eager.expected_loss is None
    assert "fast: int8 weights" in str(report) and f"expected loss of PSNR {exact.expected_loss:.3f} dB" in str(report)
    assert engine.memory["weights"] < accelerate(tok, dtype=torch.float32).memory["weights"] / 2.9
    z = latents(tok, 3)
    assert psnr(engine.decode(z, 1), tok.decode(z, 1)).min() > 37  # no latents of photographs: those have 45 and more


@pytest.mark.skipif(not NATIVE_INT8, reason="no instructions for int8, or no extension, on this machine")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_native_int8_nano(monkeypatch, dtype):
    """Recorded like the exact tier, with a quarter of the error of 7 bits."""
    pytest.importorskip("skimage")
    monkeypatch.setenv("MSDD_FAST_NATIVE_LINEAR", "auto")
    tok = nano()
    engine = accelerate(tok, dtype=dtype, tier="fast", graphs=True)
    z = latents(tok, 3)
    images = engine.decode(z, 1)
    assert engine.accuracy.expected_loss < 0.02 and psnr(images, tok.decode(z, 1)).min() > 42
    assert torch.equal(engine.decode(z, 1), images) and engine.graphs
    assert "int8 products of the extension: the fast tier" in str(engine.report())
    for i in range(3):
        assert (engine.decode(z[i : i + 1], 1 + i) - images[i]).abs().max() < 1e-5


def test_int8_of_onednn_is_declined_where_bfloat16_is_faster(cross, monkeypatch):
    monkeypatch.setenv("MSDD_FAST_NATIVE_LINEAR", "0")
    monkeypatch.setenv("MSDD_FAST_CPU_BF16", "1")
    with pytest.raises(BackendUnavailableError, match=r"tier='fast' cannot be had: oneDNN's int8 products measured"):
        accelerate(cross, dtype=torch.bfloat16, tier="fast")


def test_float8_nano_is_within_the_limit(float8):
    pytest.importorskip("skimage")
    engine = accelerate(nano(), **FLOAT8)
    assert engine.dtype == torch.bfloat16 and 0.01 < engine.accuracy.expected_loss < 0.1
    blocks = engine.program.network.w.blocks
    assert all(isinstance(s.down, Fp8Linear) for b in blocks for s in b.streams)
    assert isinstance(engine.program.network.w.final, DenseLinear)


@pytest.mark.parametrize("steps", [1, 2])
def test_float8_of_every_kind_of_model(tok, float8, steps):
    z = latents(tok, 2)
    engine = accelerate(tok, max_psnr_loss=10.0, calibration=z, steps=steps, cfg_scale=1.5, **FLOAT8)
    exact = accelerate(tok, steps=steps, cfg_scale=1.5)
    assert engine.accuracy.against == "exact tier, 2 given latents"
    mine, theirs = engine.decode(z, 0).clamp(-1, 1), exact.decode(z, 0).clamp(-1, 1)
    mse = float((mine - theirs).square().mean())
    assert engine.accuracy.psnr == pytest.approx(10 * math.log10(4 / mse), abs=1e-3)
    assert engine.accuracy.psnr > 25


@pytest.mark.parametrize("spoil", [0.1, float("nan")])
def test_a_tier_that_loses_too_much_is_refused(cross, monkeypatch, spoil):
    """Planted: one scale of one linear in each block is wrong, or NaN."""

    class Spoiled(DenseLinear):
        def __init__(self, weight, bias, swiglu=None):
            weight = weight.clone()
            weight[0] *= 1 + spoil
            super().__init__(weight, bias, swiglu)

    bad = tier.Tier("fast", Spoiled, "spoiled")
    monkeypatch.setattr(fast_decoder, "fast_tier", lambda *_: bad)
    loss = accelerate(cross, dtype=torch.float32, tier="fast", max_psnr_loss=99.0).accuracy if spoil == 0.1 else None
    limit = 0.9 * loss.expected_loss if loss else 0.1
    number = f"{loss.expected_loss:.3f}" if loss else "nan"
    message = rf"max_psnr_loss is {limit:g} dB, but tier='fast' is expected to lose {number} dB \(it has a PSNR of"
    with pytest.raises(AccuracyError, match=message):
        accelerate(cross, dtype=torch.float32, tier="fast", max_psnr_loss=limit)
    if loss:
        engine = accelerate(cross, dtype=torch.float32, tier="fast", max_psnr_loss=1.1 * loss.expected_loss)
        assert engine.accuracy == loss


def test_the_exact_tier_has_no_loss_of_its_own(cross, monkeypatch):
    monkeypatch.setattr(fast_decoder, "fast_tier", lambda *_: tier.EXACT._replace(name="fast"))
    assert accelerate(cross, dtype=torch.float32, tier="fast", max_psnr_loss=0.0).accuracy.expected_loss == 0.0


def test_one_set_of_weights_at_a_time(cross, monkeypatch):
    alive = weakref.WeakSet()
    exact_alive = []

    class Tracked(DenseLinear):
        def __init__(self, weight, bias, swiglu=None):
            super().__init__(weight, bias, swiglu)
            alive.add(self)

    class Fast(DenseLinear):
        def __init__(self, weight, bias, swiglu=None):
            super().__init__(weight, bias, swiglu)
            gc.collect()
            exact_alive.append(len(alive))

    monkeypatch.setattr(fast_decoder, "EXACT", tier.Tier("exact", Tracked, "tracked"))
    monkeypatch.setattr(fast_decoder, "fast_tier", lambda *_: tier.Tier("fast", Fast, "as exact"))
    gc.collect()
    gc.freeze()  # or every collection looks through all that other tests have left
    try:
        accelerate(cross, dtype=torch.float32, tier="fast")
    finally:
        gc.unfreeze()
    assert exact_alive and set(exact_alive) == {0}


def test_one_linear_that_cannot_keeps_all_from_float8(float8):
    tiny = get_preset("tiny")
    odd = perturbed(replace(tiny, decoder=replace(tiny.decoder, mlp_multiple_of=1)))
    name = next(n for n, w in family_of(odd.config).quantizable(odd.decoder) if any(s % 16 for s in w.shape))
    with pytest.raises(
        BackendUnavailableError, match=rf"tier='fast' cannot be had: {name} is \(\d+, \d+\), and float8"
    ):
        accelerate(odd, tier="fast")
    odd.decoder.get_submodule(name.removeprefix("decoder."))  # it is a name that the user knows


def test_linears_are_those_that_the_engine_packs(tok, float8):
    seen = []

    class Counted(DenseLinear):
        def __init__(self, weight, bias, swiglu=None):
            seen.append(weight.numel())
            super().__init__(weight, bias, swiglu)

    from msdd_fast.families.msdd.engine.weights import pack

    pack(tok.decoder, torch.float32, torch.device("cpu"), Counted, ops.swiglu)
    assert sum(seen) == sum(w.numel() for _, w in family_of(tok.config).quantizable(tok.decoder))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_float8_needs_a_gpu_that_has_it(monkeypatch):
    assert fp8.available(torch.device("cpu")) == (False, "float8 needs an NVIDIA GPU, the tokenizer is on cpu")
    cuda = torch.device("cuda:0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert fp8.available(cuda)[1] == "float8 needs sm_89 or newer (Ada, Hopper, Blackwell), this GPU is sm_80"

    def refuse(*_, **__):
        raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED\nand much more")

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (12, 0))
    monkeypatch.setattr(torch, "ones", refuse)
    reason = "torch._scaled_mm with row-wise scales does not run on this GPU: CUBLAS_STATUS_NOT_SUPPORTED"
    assert fp8.available(cuda) == (False, reason)


def test_a_cpu_without_int8_has_no_fast_tier(cross, monkeypatch):
    def missing(*_):
        raise AttributeError("'_OpNamespace' 'onednn' object has no attribute 'qlinear_prepack'")

    monkeypatch.setattr(OneDnnInt8Linear, "__init__", missing)
    monkeypatch.setattr(int8, "is_native", lambda: False)
    with pytest.raises(
        BackendUnavailableError, match=r"tier='fast' cannot be had: int8 needs oneDNN's product \(x86\)"
    ):
        accelerate(cross, tier="fast")


def test_random_latents_without_scikit_image(cross, monkeypatch):
    def missing(size):
        raise InputError("no scikit-image")

    monkeypatch.setattr(tier, "photographs", missing)
    z, source = tier.calibration_latents(cross, None)
    assert z.shape == (8, 16, 32) and source == "random latents"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"calibration": torch.zeros(1, 16, 32), "tier": "exact"}, "calibration is for tier='fast', got it with"),
        ({"calibration": torch.zeros(1, 8, 32)}, r"calibration: z must have shape \(B, 16, 32\), got \(1, 8, 32\)"),
        ({"calibration": torch.zeros(0, 16, 32)}, "calibration must hold at least one image's latents, got none"),
        ({"max_psnr_loss": -1.0}, "max_psnr_loss must be a finite number >= 0, got -1.0"),
        ({"max_psnr_loss": float("nan")}, "max_psnr_loss must be a finite number >= 0, got nan"),
        ({"max_psnr_loss": "none"}, "max_psnr_loss must be a finite number >= 0, got 'none'"),
        ({"dtype": torch.float32}, "dtype must be torch.bfloat16 with tier='fast' on a GPU, got torch.float32"),
    ],
)
def test_bad_arguments(cross, float8, arguments, message):
    with pytest.raises(InputError, match=message):
        accelerate(cross, **{"tier": "fast", **arguments})


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_FP8, reason="needs float8 on a GPU")
def test_float8_on_a_gpu_with_graphs():
    tok = nano().cuda()
    engine = accelerate(tok, tier="fast", batch_sizes=(1, 4), graphs=True)
    engine.warmup()
    z = latents(tok, 6).cuda()
    plain = accelerate(tok, tier="fast", graphs=False)
    for _ in range(2):
        assert psnr(engine.decode(z, 3), plain.decode(z, 3)).min() > 60
    assert engine.graphs and engine.accuracy.expected_loss < 0.1
