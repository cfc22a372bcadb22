"""The C++ noise against the torch reference, and its wrappers' errors."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from msdd_fast import backends, native, ops
from msdd_fast.backends.extension import load_extension
from msdd_fast.diffusion import noise
from msdd_fast.errors import InputError
from msdd_fast.native._call import GIVEN, in_order, metadata, operand

if not backends.extension_status()[0]:
    pytest.skip(f"msdd_fast._C {backends.extension_status()[1]}", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[2]
SEEDS = torch.tensor([0, 2**63 - 1, 0x123456789ABCDEF, 42, 7])
# Rows of 16, 32 and 3 blocks: whole vectors, and tails only; one image big enough for several threads.
SHAPES = [(3, 32, 32), (1, 2, 2), (3, 10, 70), (2, 64, 6), (3, 256, 256)]
ZERO, ONE = torch.tensor(0.0), torch.tensor(1.0)


def start_noise(seeds, shape, dtype=torch.float32):
    return native.start_noise(seeds, *shape, dtype)


def renoise_noise(seeds, shape, stage, correlation):
    """The noise alone, exactly: 0 * 0 + 1 * n."""
    c, h, w = shape
    x = torch.zeros(len(seeds), c, h // 2, w // 2)
    return native.renoise_upsample(x, ZERO, ONE, seeds, stage, correlation)


@pytest.mark.parametrize(
    ("value", "expected"),
    [("plain", "plain plain plain"), ("avx2", "avx2 avx2 plain"), ("sse9", "must be auto, plain, avx2")],
)
def test_the_highest_level_can_be_chosen(value, expected, fresh):
    if value == "avx2" and load_extension().linear_level() == "plain":
        pytest.skip("this machine cannot run avx2")
    code = (
        "from msdd_fast.backends.extension import load_extension; e = load_extension();"
        "print(e.linear_level(), e.attention_level(), e.linear_int8_level())"
    )
    run = fresh(code, MSDD_FAST_CPU_LEVEL=value)
    assert expected in run.stdout + run.stderr


def test_a_level_that_does_not_exist_is_an_error_of_ours(fresh):
    code = "import msdd_fast; msdd_fast.accelerate('msdd-nano')"
    run = fresh(code, MSDD_FAST_CPU_LEVEL="sse9", MSDD_FAST_NATIVE_LINEAR="auto")
    assert "InputError: MSDD_FAST_CPU_LEVEL must be auto, plain, avx2" in run.stderr


def test_integers_equal_the_reference():
    generator = torch.Generator().manual_seed(0)
    counters = torch.randint(0, 2**32, (200, 4), generator=generator)
    keys = torch.randint(0, 2**32, (200, 2), generator=generator)
    expected = torch.stack(noise.philox(tuple(counters.T), tuple(keys.T)), dim=1)
    extension = backends.load_extension()
    assert [extension.philox(c, k) for c, k in zip(counters.tolist(), keys.tolist(), strict=True)] == expected.tolist()
    assert extension.philox([0] * 4, [0] * 2) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@pytest.mark.parametrize("shape", SHAPES)
def test_start_noise(shape):
    actual = start_noise(SEEDS, shape)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, noise.start_noise(SEEDS, shape), rtol=0, atol=1e-6)


@pytest.mark.parametrize("stage", [0, 3, 2**32 - 1])
@pytest.mark.parametrize("correlation", [-1 / 3, -0.2, 0, 0.25, 0.999])
def test_renoise_noise(stage, correlation):
    for shape in SHAPES[:4]:
        actual = renoise_noise(SEEDS, shape, stage, correlation)
        torch.testing.assert_close(actual, noise.renoise_noise(SEEDS, shape, stage, correlation), rtol=0, atol=1e-6)


def test_float32_minus_one_third_is_accepted():
    rounded = float(torch.tensor(-1 / 3))  # just below -1/3
    actual = renoise_noise(SEEDS, (3, 8, 8), 1, rounded)
    torch.testing.assert_close(actual, noise.renoise_noise(SEEDS, (3, 8, 8), 1, rounded), rtol=0, atol=1e-6)


def test_an_image_does_not_depend_on_batch_or_threads():
    shape = (3, 128, 70)
    whole = renoise_noise(SEEDS, shape, 2, -1 / 3)
    for cut in range(1, len(SEEDS)):
        parts = [renoise_noise(s, shape, 2, -1 / 3) for s in (SEEDS[:cut], SEEDS[cut:])]
        assert torch.equal(whole, torch.cat(parts))
    x = torch.zeros(len(SEEDS), 3, 64, 35)
    for threads in (1, 3, 64):
        out = torch.empty_like(whole)
        backends.load_extension().renoise_upsample(
            *(out.data_ptr(), operand(x), ZERO.data_ptr(), ONE.data_ptr(), (SEEDS.data_ptr(), len(SEEDS))),
            **dict(channels_last=False, stage=2, correlation=-1 / 3, threads=threads),
        )
        assert torch.equal(whole, out)


def test_strided_seeds_and_empty_sizes():
    seeds = torch.stack([SEEDS, SEEDS + 1 - (SEEDS > 10).long()], dim=1)[:, 0]
    with pytest.raises(InputError, match=r"seeds must be contiguous, got strides \(2,\)"):
        start_noise(seeds, (1, 4, 4))
    assert torch.equal(ops.start_noise(seeds, (1, 4, 4), backend="cpu"), start_noise(SEEDS, (1, 4, 4)))
    for batch, shape in [(0, (3, 4, 4)), (2, (0, 4, 4)), (2, (3, 0, 4)), (2, (3, 4, 0))]:
        assert start_noise(SEEDS[:batch], shape).shape == (batch, *shape)
        assert renoise_noise(SEEDS[:batch], shape, 1, 0.0).shape == (batch, *shape)


def test_results_are_on_the_cpu_whatever_the_default_device():
    with torch.device("meta"):
        assert start_noise(SEEDS, (3, 4, 4)).device.type == "cpu"
        out = native.renoise_upsample(torch.zeros(5, 1, 2, 2, device="cpu"), ZERO, ONE, SEEDS, 1, 0.0)
    assert out.device.type == "cpu"


SEEDS_MESSAGE = r"seeds must be an int64 tensor \(B,\) on the CPU, got "


@pytest.mark.parametrize(
    ("seeds", "message"),
    [
        ([1, 2], SEEDS_MESSAGE + "list"),
        (SEEDS.int(), SEEDS_MESSAGE + "torch.int32"),
        (SEEDS[None], SEEDS_MESSAGE + r"torch.int64 \(1, 5\)"),
        (SEEDS.to("meta"), SEEDS_MESSAGE + r"torch.int64 \(5,\) on meta"),
    ],
)
def test_bad_seeds_are_refused(seeds, message):
    with pytest.raises(InputError, match=message):
        start_noise(seeds, (3, 4, 4))
    with pytest.raises(InputError, match=message):
        native.renoise_upsample(torch.zeros(5, 3, 2, 2), ZERO, ONE, seeds, 1, 0.0)


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((3, 5, 4), torch.float32, "start_noise: height and width must be even.*5x4"),
        ((3, -2, 4), torch.float32, r"must not be negative, got \(3, -2, 4\)"),
        ((3, 4, 4), torch.float64, "dtype must be float32, bfloat16 or float16, got torch.float64"),
    ],
)
def test_bad_shapes_and_dtypes_are_refused(shape, dtype, message):
    with pytest.raises(InputError, match=message):
        start_noise(SEEDS, shape, dtype)


def test_bad_renoise_arguments_are_refused():
    x = torch.zeros(5, 3, 4, 4)
    for bad, message in [
        (x[:4], "renoise_upsample: seeds must be one per image, 4, got 5"),
        (x[..., 0], r"x must be \(B, C, H, W\), got \(5, 3, 4\)"),
        (
            x.transpose(2, 3),
            r"x must be contiguous, got shape \(5, 3, 4, 4\), strides \(48, 16, 1, 4\)",
        ),
        (x.double(), "x must be a float32, bfloat16 or float16 tensor on the CPU, got torch.float64 on cpu"),
        (x.to("meta"), "x must be a float32.* tensor on the CPU, got torch.float32 on meta"),
    ]:
        with pytest.raises(InputError, match=message):
            native.renoise_upsample(bad, ONE, ONE, SEEDS, 1, 0.0)
    for stage in (-1, 2**32):
        with pytest.raises(InputError, match=r"renoise_upsample: stage must be in \[0, 2\^32\)"):
            native.renoise_upsample(x, ONE, ONE, SEEDS, stage, 0.0)
    for correlation in (1.0, -0.34, float("nan")):
        with pytest.raises(InputError, match=r"correlation must be in \[-1/3, 1\)"):
            native.renoise_upsample(x, ONE, ONE, SEEDS, 1, correlation)


def test_the_extension_itself_refuses_what_it_cannot_do():
    """Before it touches memory: the null addresses here would crash otherwise."""
    extension, none, ones = backends.load_extension(), (0, 0, 0, 0), (ONE.data_ptr(), ONE.data_ptr())
    with pytest.raises(ValueError, match=r"even.*3x4"):
        extension.start_noise(0, (0, 1), 0, 1, 1, 3, 4)
    with pytest.raises(ValueError, match="negative"):
        extension.start_noise(0, (0, 0), 0, -1, 1, 4, 4)
    with pytest.raises(ValueError, match="threads must be at least 1, got 0"):
        extension.start_noise(0, (0, 1), 0, 1, 1, 4, 4, threads=0)
    with pytest.raises(ValueError, match=r"2\^32 blocks"):
        extension.start_noise(0, (0, 1), 0, 1, 2**40, 2**20, 2**20)
    with pytest.raises(ValueError, match=r"dtype must be 0 .* got 3"):
        extension.start_noise(0, (0, 1), 3, 1, 1, 4, 4)
    with pytest.raises(ValueError, match="stage"):
        extension.renoise_upsample(0, (16, 0, (1, 1, 4, 4), (16, 16, 4, 1)), *ones, (0, 1), False, 2**32, 0.0)
    with pytest.raises(ValueError, match="x is missing"):
        extension.renoise_upsample(0, (0, 0, (1, 1, 4, 4), (16, 16, 4, 1)), *ones, (0, 1), False, 1, 0.0)
    with pytest.raises(ValueError, match="v_cond is missing"):
        extension.cfg_euler(0, none, none, none, *ones, 0, 1, 1)
    with pytest.raises(ValueError, match="negative"):
        extension.cfg_euler(0, none, none, none, *ones, 0, -1, 1)


def tensor(*shape, strides=None, dtype=0):
    """A tensor as the extension takes it, at an address that nothing may read."""
    return 16, dtype, shape, strides or torch.empty(shape, device="meta").stride()


SCALAR = ONE.data_ptr()  # read before the checks
LINE = (64, 0, (128,), (1,))  # a packed weight of 8 x 16, at an aligned address
IMAGE, HEADS = tensor(2, 4, 8, 8), tensor(1, 4, 2, 16)
MAP = tensor(2, 4, 8, 8, strides=(256, 1, 32, 4))  # channels-last
REFUSED = {
    "renoise_upsample": (
        dict(out=16, x=IMAGE, channels_last=False, seeds=(16, 2), alpha=SCALAR, beta=SCALAR, stage=1, correlation=0.0),
        (dict(seeds=(16, 1)), "seeds must be one per image, 2, got 1"),
        (dict(x=tensor(2, 4, 8)), r"x must be of 4 dimensions, got shape \(2, 4, 8\)"),
        (dict(channels_last=True), r"x must be channels-last, got shape \(2, 4, 8, 8\), strides \(256, 64, 8, 1\)"),
        (dict(out=0), "out or seeds is missing"),
    ),
    "cfg_euler": (
        dict(out=16, dtype=0, x=(16, 0, 4, 8), v_cond=(16, 0, 4, 8), v_uncond=(0, 0, 0, 0), rows=2, columns=4)
        | dict(scale=SCALAR, dt=SCALAR),
        (dict(x=(16, 0, 4, 7)), "x must be 2 rows of 4, got 7 elements, rows 4 apart"),
        (dict(v_cond=(16, 0, -4, 8)), "v_cond must be 2 rows of 4, got 8 elements, rows -4 apart"),
        (dict(out=0), "out is missing"),
    ),
    "norm_modulate": (
        dict(h=16, x_new=16, x=tensor(6, 8), y=tensor(6, 8), gate=tensor(2, 8), shift=tensor(2, 8))
        | dict(scale=tensor(2, 8), rms_weight=None, run=3, eps=1e-6),
        (dict(x=tensor(6, 8, strides=(16, 1))), r"x must be contiguous, got shape \(6, 8\), strides \(16, 1\)"),
        (dict(y=tensor(5, 8)), r"y must be of shape \(6, 8\), got \(5, 8\)"),
        (dict(gate=tensor(1, 8)), r"gate must be of shape \(2, 8\), got \(1, 8\)"),
        (dict(scale=tensor(2, 7)), r"scale must be of shape \(2, 8\), got \(2, 7\)"),
        (dict(shift=tensor(2, 8, strides=(1, 2))), "shift must be contiguous in its last dimension"),
        (dict(x_new=0), "h or x_new is missing"),
        (dict(gate=None), "gate is missing"),
        (dict(rms_weight=tensor(7)), r"rms_weight must be of shape \(8\), got \(7\)"),
        (dict(rms_weight=tensor(8, strides=(2,))), "rms_weight must be contiguous"),
        (dict(rms_weight=tensor(3, 8)), r"rms_weight must be of shape \(2, 8\), got \(3, 8\)"),
        (dict(rms_weight=tensor(2, 8, strides=(1, 2))), "rms_weight must be contiguous in its last dimension"),
    ),
    "qk_norm_rope": (
        dict(out=tensor(2, 5, 2, 3, 16), x=tensor(2, 5, 3, 3, 16), weight=tensor(2, 2, 16), bias=tensor(2, 2, 16))
        | dict(cos=tensor(5, 8), sin=tensor(5, 8), split=2, eps=1e-6),
        (dict(weight=tensor(2, 16)), r"weight must be at least 64 elements, got shape \(2, 16\)"),
        (dict(bias=tensor(1, 2, 16)), r"bias must be at least 64 elements, got shape \(1, 2, 16\)"),
        (dict(cos=tensor(4, 8)), r"cos must be at least 40 elements, got shape \(4, 8\)"),
        (dict(sin=tensor(5, 8, dtype=1)), "sin must be float32, got bfloat16"),
        (dict(cos=None), "cos is missing"),
        (dict(out=tensor(2, 5, 3, 3, 16)), r"out must be of shape \(2, 5, 2, 3, 16\), got \(2, 5, 3, 3, 16\)"),
        (dict(out=tensor(2, 5, 2, 3, 16, dtype=1)), "out must be float32, got bfloat16"),
        (dict(out=tensor(2, 5, 2, 3, 16, strides=(960, 192, 96, 32, 1))), r"out must be dense in"),
        (dict(x=tensor(2, 5, 3, 3, 16, strides=(720, 144, 16, 48, 1))), "x must be contiguous in its last 3"),
    ),
    "sigma_gate": (
        dict(x_new=16, h=16, x=tensor(6, 8), y=tensor(6, 8), offset=tensor(6, 1), shift=tensor(2, 8))
        | dict(scale=tensor(2, 8), rms_weight=tensor(8), logit=None, weight=tensor(8), run=3, eps=1e-6),
        (dict(x=tensor(6, 8, strides=(9, 1))), r"x must be contiguous, got shape \(6, 8\), strides \(9, 1\)"),
        (dict(y=tensor(5, 8)), r"y must be of shape \(6, 8\), got \(5, 8\)"),
        (dict(offset=tensor(6, 7)), r"offset must be of shape \(6, 8\), got \(6, 7\)"),
        (dict(offset=tensor(5, 1)), r"offset must be of shape \(6, 1\), got \(5, 1\)"),
        (dict(offset=tensor(6, 8, strides=(1, 6))), "offset must be contiguous, got shape"),
        (dict(offset=tensor(6, 8, strides=(9, 1))), "offset must be contiguous, got shape"),
        (dict(offset=tensor(6)), r"offset must be of shape \(6, 8\), got \(6\)"),
        (dict(offset=None), "offset is missing"),
        (dict(weight=tensor(7)), r"weight must be of shape \(8\), got \(7\)"),
        (dict(weight=None), "either logit or weight must be given"),
        (dict(logit=tensor(6, 1)), "either logit or weight must be given"),
        (dict(scale=tensor(1, 8)), r"scale must be of shape \(2, 8\), got \(1, 8\)"),
        (dict(rms_weight=tensor(8, strides=(2,))), "rms_weight must be contiguous"),
        (dict(rms_weight=None), "scale or rms_weight is missing"),
        (dict(run=0), "run and groups must be at least 1"),
        (dict(h=0), "x_new or h is missing"),
    ),
    "pixel_modulate": (
        dict(out=16, x=tensor(3, 2, 4), s=tensor(3, 8), packed=LINE, bias=tensor(16), rms_weight=tensor(4), eps=1e-6)
        | dict(level="plain"),
        (dict(x=tensor(3, 2, 4, strides=(9, 4, 1))), "x must be contiguous"),
        (dict(s=tensor(2, 8)), r"s must be of shape \(3, 8\), got \(2, 8\)"),
        (dict(s=tensor(3, 8, strides=(1, 3))), "s must be contiguous in its last dimension"),
        (dict(s=tensor(3, 9)), r"packed must be of shape \(144\), got \(128\)"),
        (dict(packed=tensor(128)), "packed must be aligned to 64 bytes"),
        (dict(bias=tensor(15)), r"bias must be of shape \(16\), got \(15\)"),
        (dict(rms_weight=tensor(5)), r"rms_weight must be of shape \(4\), got \(5\)"),
        (dict(x=tensor(3, 1, 8), rms_weight=tensor(4)), r"rms_weight must be of shape \(8\), got \(4\)"),
        (dict(level="sse9"), "level must be plain"),
        (dict(out=0), "out is missing"),
        (dict(x=tensor(3, 4, 2), rms_weight=tensor(2)), "channels must be a multiple of 4 up to 64, got 2"),
    ),
    "pixel_block": (
        dict(out=16, x=tensor(3, 1, 4), y=tensor(3, 1, 4), s=tensor(3, 8), packed=LINE, bias=tensor(16))
        | dict(rms_weight=tensor(4), fc1_weight=tensor(5, 4), fc1_bias=tensor(5), fc2_weight=tensor(4, 5))
        | dict(fc2_bias=tensor(4), eps=1e-6, level="plain"),
        (dict(y=tensor(3, 2, 4)), r"y must be of shape \(3, 1, 4\), got \(3, 2, 4\)"),
        (dict(fc1_weight=tensor(4, 5)), r"fc1_weight must be of shape \(5, 4\), got \(4, 5\)"),
        (dict(fc1_bias=tensor(6)), r"fc1_weight must be of shape \(6, 4\), got \(5, 4\)"),
        (dict(fc2_weight=tensor(4, 5, strides=(1, 4))), "fc2_weight must be contiguous"),
        (dict(fc2_bias=tensor(5)), r"fc2_bias must be of shape \(4\), got \(5\)"),
        (dict(fc1_weight=tensor(257, 4), fc1_bias=tensor(257), fc2_weight=tensor(4, 257)), "hidden .* at most 256"),
        (dict(bias=tensor(8)), r"bias must be of shape \(16\), got \(8\)"),
        (dict(y=None), "y is missing"),
        (dict(out=0), "out is missing"),
    ),
    "sde_step": (
        dict(out=16, x=IMAGE, v=IMAGE, noise=None, seeds=(16, 2), t=SCALAR, t_next=SCALAR, stage=1, patch=0)
        | dict(clamp=False),
        (dict(v=tensor(2, 4, 8, 7)), r"v must be of shape \(2, 4, 8, 8\), got \(2, 4, 8, 7\)"),
        (dict(x=tensor(2, 4, 8, 8, strides=(256, 1, 32, 4))), "x must be contiguous"),
        (dict(patch=4), r"v must be of shape \(4, 2, 16, 4\), got \(2, 4, 8, 8\)"),
        (dict(patch=3), "patch must divide height and width"),
        (dict(patch=-4), "patch must divide height and width"),
        (dict(seeds=(16, 1)), "seeds must be one per image, 2, got 1"),
        (dict(seeds=(0, 0)), "either seeds or noise must be given"),
        (dict(noise=IMAGE), "either seeds or noise must be given"),
        (dict(seeds=(0, 0), noise=tensor(2, 4, 8, 6)), r"noise must be of shape \(2, 4, 8, 8\), got \(2, 4, 8, 6\)"),
        (dict(stage=2**32), r"stage must be in \[0, 2\^32\), got 4294967296"),
        (dict(t=0), "t is missing"),
        (dict(out=0), "out, x or v is missing"),
        (dict(x=tensor(2, 4, 7, 8), v=tensor(2, 4, 7, 8)), "height and width must be even"),
    ),
    "swiglu": (
        dict(out=16, a=tensor(4, 6), b=tensor(4, 6)),
        (dict(b=tensor(4, 5)), r"b must be of shape \(4, 6\), got \(4, 5\)"),
        (dict(b=tensor(4, 6, dtype=2)), "b must be float32, got float16"),
        (dict(a=tensor(4, 6, strides=(1, 4))), "a must be contiguous in its last dimension"),
        (dict(a=(0, 0, (4, 6), (6, 1))), "a is missing"),
    ),
    "geglu": (
        dict(out=16, value=tensor(2, 3, 6), gate=tensor(2, 3, 6)),
        (dict(gate=tensor(2, 3, 5)), r"gate must be of shape \(2, 3, 6\), got \(2, 3, 5\)"),
        (dict(gate=tensor(2, 3, 6, dtype=2)), "gate must be float32, got float16"),
        (dict(value=tensor(2, 3, 6, strides=(18, 1, 3))), "value must be contiguous in its last dimension"),
        (dict(gate=tensor(2, 3, 6, strides=(6, 12, 1))), r"gate must be of rows at one stride, got .* \(6, 12, 1\)"),
        (dict(value=tensor(2, 3, 6, strides=(24, 12, 1))), r"value must be of rows at one stride, got .*"),
        (dict(value=tensor(), gate=tensor()), r"value must be of one dimension or more, got shape \(\)"),
        (dict(gate=(0, 0, (2, 3, 6), (18, 6, 1))), "gate is missing"),
        (dict(out=0), "out, value or gate is missing"),
    ),
    "linear": (
        dict(out=tensor(3, 6), x=tensor(3, 8), packed=LINE, bias=tensor(6), features=6, swiglu=False, level="plain"),
        (dict(packed=tensor(127)), r"packed must be of shape \(128\), got \(127\)"),
        (dict(packed=(64, 1, (128,), (1,))), "packed must be float32, got bfloat16"),
        (dict(packed=tensor(128)), "packed must be aligned to 64 bytes"),
        (dict(x=tensor(3, 9)), r"packed must be of shape \(144\), got \(128\)"),
        (dict(out=tensor(2, 6)), r"out must be of shape \(3, 6\), got \(2, 6\)"),
        (dict(swiglu=True), r"out must be of shape \(3, 3\), got \(3, 6\)"),
        (dict(bias=tensor(3)), r"bias must be of shape \(6\), got \(3\)"),
        (dict(bias=tensor(6, strides=(2,))), "bias must be contiguous"),
        (dict(features=-6), "sizes must not be negative"),
        (dict(x=None), "x is missing"),
    ),
    "convolution": (
        dict(out=16, x=MAP, more=None, packed=(64, 0, (576,), (1,)), bias=tensor(6), weight=tensor(4), offset=tensor(4))
        | dict(scale=tensor(2, 4, 2, 2), shift=tensor(2, 4, 2, 2), added=tensor(2, 6, 8, 8, strides=(384, 1, 48, 6)))
        | dict(added_more=None, channels=6, kind=0, groups=2, silu=True, eps=1e-6, shortcut=False, level="plain"),
        (dict(x=IMAGE), r"x must be channels-last, got shape \(2, 4, 8, 8\), strides \(256, 64, 8, 1\)"),
        (dict(x=None), "x is missing"),
        (dict(more=tensor(2, 4, 8, 7, strides=(224, 1, 28, 4))), r"more must be of shape \(2, 4, 8, 8\), got"),
        (dict(more=MAP), r"norm_weight must be of shape \(8\), got \(4\)"),
        (dict(packed=tensor(576)), "packed must be aligned to 64 bytes"),
        (dict(packed=(64, 0, (575,), (1,))), r"packed must be of shape \(576\), got \(575\)"),
        (dict(packed=(64, 1, (576,), (1,))), "packed must be float32, got bfloat16"),
        (dict(channels=17, bias=None, added=None), r"packed must be of shape \(1152\), got \(576\)"),
        (dict(bias=tensor(6, strides=(2,))), "bias must be contiguous"),
        (dict(offset=tensor(3)), r"norm_bias must be of shape \(4\), got \(3\)"),
        (dict(shift=tensor(2, 4, 1, 2)), r"shift must be of shape \(2, 4, 2, 2\), got \(2, 4, 1, 2\)"),
        (dict(scale=None, shift=tensor(2, 4, 3, 2)), "must divide height and width"),
        (dict(groups=3), "groups must divide channels"),
        (dict(kind=1), r"added must be of shape \(2, 6, 4, 4\), got \(2, 6, 8, 8\)"),
        (dict(kind=3), "kind must be 0 to 2, got 3"),
        (dict(kind=-1), "kind must be 0 to 2, got -1"),
        (dict(channels=-6, bias=None, added=None), "packed must be of shape|must not be negative"),
        (dict(level="sse9"), "level must be plain"),
        (dict(out=0), "out, maps or packed is missing"),
    ),
    "linear_pack": (
        dict(packed=LINE, weight=tensor(6, 8), swiglu=False, level="plain"),
        (dict(weight=tensor(17, 8)), r"packed must be of shape \(256\), got \(128\)"),
        (dict(weight=tensor(6, 8, strides=(1, 6))), "weight must be contiguous in its last dimension"),
        (dict(packed=tensor(128)), "packed must be aligned to 64 bytes"),
    ),
    "attention": (
        dict(out=HEADS, q=HEADS, k=tensor(1, 7, 2, 16), v=tensor(1, 7, 2, 16), accumulate=None),
        (dict(k=tensor(1, 7, 1, 16)), r"k must be of shape \(1, 7, 2, 16\), got \(1, 7, 1, 16\)"),
        (dict(v=tensor(1, 6, 2, 16)), r"v must be of shape \(1, 7, 2, 16\), got \(1, 6, 2, 16\)"),
        (dict(v=tensor(1, 7, 2, 16, dtype=1)), "v must be float32, got bfloat16"),
        (dict(accumulate=tensor(1, 3, 2, 16)), "accumulate must be of shape"),
        (dict(out=tensor(1, 4, 2, 8)), "out must be of shape"),
        (dict(q=tensor(1, 4, 2, 16, strides=(128, 32, 16, 2))), "q must be contiguous in its last dimension"),
    ),
    "group_norm_modulate_silu": (
        dict(out=16, x=IMAGE, weight=tensor(4), bias=tensor(4), scale=tensor(2, 4, 2, 2), shift=tensor(2, 4, 2, 2))
        | dict(groups=2, channels_last=False, silu=True, eps=1e-6),
        (dict(weight=tensor(3)), r"weight must be of shape \(4\), got \(3\)"),
        (dict(bias=tensor(4, strides=(2,))), "bias must be contiguous"),
        (dict(scale=tensor(2, 3, 2, 2)), r"scale must be of shape \(2, 4, 2, 2\), got \(2, 3, 2, 2\)"),
        (dict(shift=tensor(2, 4, 1, 2)), r"shift must be of shape \(2, 4, 2, 2\), got \(2, 4, 1, 2\)"),
        (dict(scale=None, shift=tensor(2, 4, 3, 2)), "must divide height and width"),
        (dict(out=0), "out is missing"),
    ),
    "window_attention": (
        dict(out=HEADS, q=HEADS, k=HEADS, v=HEADS, table=tensor(3, 3, 2), height=2, width=2),
        (dict(table=tensor(3, 3, 1)), r"table must be of shape \(3, 3, 2\), got \(3, 3, 1\)"),
        (dict(table=tensor(4, 4, 2)), r"table must be of shape \(3, 3, 2\), got \(4, 4, 2\)"),
        (dict(height=3), r"must be of shape \(1, 6, 2, 16\), got \(1, 4, 2, 16\)"),
        (dict(height=-2, width=-2), "sizes must not be negative"),
    ),
    "stage_transition": (
        dict(out=16, x=tensor(4, 2, 12), v=tensor(4, 2, 12), v_uncond=None, shape=(2, 2, 3, 2), dt=SCALAR, scale=SCALAR)
        | dict(seeds=(16, 2), alpha=SCALAR, beta=SCALAR, stage=1, correlation=0.0),
        (dict(v=tensor(4, 1, 12)), r"v must be of shape \(4, 2, 12\), got \(4, 1, 12\)"),
        (dict(shape=(3, 2, 3, 2)), r"must be of shape \(9, 2, 12\), got \(4, 2, 12\)"),
        (dict(seeds=(16, 3)), "seeds must be one per image, 2, got 3"),
        (dict(x=None), "x or v is missing"),
    ),
    "final_step": (
        dict(out=16, type=0, channels_last=False, x=tensor(4, 2, 12), v=tensor(4, 2, 12), v_uncond=None)
        | dict(shape=(2, 2, 3, 2), dt=SCALAR, scale=SCALAR),
        (dict(v_uncond=tensor(4, 2, 11)), r"v_uncond must be of shape \(4, 2, 12\), got \(4, 2, 11\)"),
        (dict(x=tensor(4, 2, 12, strides=(2, 1, 8))), "x must be contiguous in its last dimension"),
        (dict(out=0), "out is missing"),
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    "name, arguments, message",
    [(name, {**good, **change}, message) for name, (good, *cases) in REFUSED.items() for change, message in cases],
)
def test_the_extension_refuses_what_would_leave_a_tensor(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        getattr(backends.load_extension(), name)(**arguments)


def test_two_entries_of_weights_are_needed_where_tokens_are_split():
    qkv = torch.empty(1, 4, 3, 1, 16)
    weight, angles = torch.ones(2, 16), torch.ones(4, 8)
    with pytest.raises(InputError, match=r"qk_norm_rope: weight must be at least 64 elements, got shape \(2, 16\)"):
        native.qk_norm_rope(qkv, weight, weight, angles, None, 2, 1e-6)


def test_the_extension_takes_tensors_as_tuples_only():
    for wrong in (0, (16, 0, (4, 6)), (16, 0, [4, 6], [6, 1]), (16, 0, (4, 6), (6,)), (16, 0, (4, "6"), (6, 1))):
        with pytest.raises(TypeError, match="incompatible function arguments"):
            backends.load_extension().swiglu(16, wrong, tensor(4, 6))


def test_constants_of_the_header_equal_those_of_noise_py():
    source = (ROOT / "csrc/include/msdd_fast/philox.h").read_text()
    scalars = dict(re.findall(r"\b([A-Z][A-Z0-9_]+) = (0x[0-9A-F]+|[0-9.]+)[;,]", source))
    names = ["PURPOSE_START", "PURPOSE_RENOISE", "PHILOX_ROUNDS", "PHILOX_M0", "PHILOX_M1", "PHILOX_W0", "PHILOX_W1"]
    for name in [*names, "SQRT_HALF_BITS"]:
        assert int(scalars[name], 0) == getattr(noise, name), name
    assert float(scalars["LN2"]) == noise.LN2
    for name in ("LN_POLY", "SIN_POLY", "COS_POLY"):
        (numbers,) = re.findall(name + r"\[\] = \{([^}]*)\}", source)
        assert tuple(float(n) for n in numbers.split(",")) == getattr(noise, name), name


def test_a_prepared_function_takes_the_addresses_that_are_given_later():
    extension = load_extension()
    assert extension.GIVEN == GIVEN
    a, b = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(0)).unbind()
    of_a, of_b = metadata("a", a), metadata("b", b)
    expected, out = native.swiglu(a, b), torch.empty(3, 16)
    call = extension.prepare_swiglu(GIVEN, of_a, of_b)
    for _ in range(2):  # it keeps nothing of a call
        assert call(out.zero_().data_ptr(), a.data_ptr(), b.data_ptr(), 1) is None
        assert torch.equal(out, expected)
    extension.prepare_swiglu(out.zero_().data_ptr(), of_a, operand(b))(a.data_ptr(), 1)  # the others are fixed
    assert torch.equal(out, expected)


def test_a_prepared_function_refuses_other_numbers_of_addresses_and_what_the_function_refuses():
    extension, x = load_extension(), torch.zeros(4, 6)
    call = extension.prepare_swiglu(GIVEN, metadata("a", x), metadata("b", x[:2]))
    address = x.data_ptr()
    with pytest.raises(TypeError, match="expected 3 addresses and the number of threads, got 3 arguments"):
        call(address, address, address)
    with pytest.raises(TypeError, match="integer"):
        call(address, address, "1", 1)
    with pytest.raises(OverflowError):
        call(address, address, -1, 1)
    with pytest.raises(ValueError, match=r"b must be of shape \(4, 6\), got \(2, 6\)"):
        call(address, address, address, 1)
    call = extension.prepare_swiglu(GIVEN, metadata("a", x), metadata("b", x))
    with pytest.raises(ValueError, match="b is missing"):
        call(address, address, 0, 1)
    with pytest.raises(ValueError, match="threads must be at least 1, got 0"):
        call(address, address, address, 0)


def test_threads_share_a_prepared_function():
    generator = torch.Generator().manual_seed(0)
    pairs = [torch.randn(2, 64, 128, generator=generator) for _ in range(8)]
    expected = [native.swiglu(*pair) for pair in pairs]
    run = native.swiglu.prepare(*pairs[0])

    def wrong(i):
        return sum(not torch.equal(run(*pairs[i]), expected[i]) for _ in range(200))

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(wrong, range(8))) == 0


def test_a_function_whose_arguments_are_in_order_needs_no_code():
    swiglu = in_order("swiglu", ("a", "b"), lambda a, b: torch.empty_like(a))
    a, b = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(0)).unbind()
    expected = native.swiglu(a, b)
    assert torch.equal(swiglu(a, b), expected)
    run = swiglu.prepare(b, a)
    assert torch.equal(run(a, b), expected)  # metadata alone were kept
    assert swiglu(a[:0], b[:0]).shape == (0, 16)
    with pytest.raises(InputError, match=r"b must be a float32, .* on the CPU, got torch\.float64"):
        swiglu(a, b.double())
    with pytest.raises(InputError, match=r"swiglu: b must be of shape \(3, 16\), got \(2, 16\)"):
        swiglu(a, b[:2])
    with pytest.raises(InputError, match="swiglu: b is missing"):
        swiglu(a, None)
