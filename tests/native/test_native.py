"""The C++ noise against the torch reference, and its wrappers' errors."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from msdd_fast import backends, native
from msdd_fast.diffusion import noise
from msdd_fast.errors import InputError

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
            *(out.data_ptr(), x.data_ptr(), 0, False, SEEDS.data_ptr(), *x.shape),
            **dict(alpha=0.0, beta=1.0, stage=2, correlation=-1 / 3, threads=threads),
        )
        assert torch.equal(whole, out)


def test_strided_seeds_and_empty_sizes():
    seeds = torch.stack([SEEDS, SEEDS + 1 - (SEEDS > 10).long()], dim=1)[:, 0]
    assert not seeds.is_contiguous()
    assert torch.equal(start_noise(seeds, (1, 4, 4)), start_noise(SEEDS, (1, 4, 4)))
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
        (x[:4], r"x must be \(B, C, H, W\) with one seed per image, got \(4, 3, 4, 4\), 5 seeds"),
        (x[..., 0], r"x must be \(B, C, H, W\).*got \(5, 3, 4\)|x must be contiguous"),
        (
            x.transpose(2, 3),
            r"x must be contiguous or channels-last, got shape \(5, 3, 4, 4\), strides \(48, 16, 1, 4\)",
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
    extension = backends.load_extension()
    with pytest.raises(ValueError, match=r"even.*3x4"):
        extension.start_noise(0, 0, 0, 1, 1, 3, 4)
    with pytest.raises(ValueError, match="negative"):
        extension.start_noise(0, 0, 0, -1, 1, 4, 4)
    with pytest.raises(ValueError, match="threads must be at least 1, got 0"):
        extension.start_noise(0, 0, 0, 1, 1, 4, 4, threads=0)
    with pytest.raises(ValueError, match=r"2\^32 blocks"):
        extension.start_noise(0, 0, 0, 1, 2**40, 2**20, 2**20)
    with pytest.raises(ValueError, match=r"dtype must be 0 .* got 3"):
        extension.start_noise(0, 3, 0, 1, 1, 4, 4)
    with pytest.raises(ValueError, match="stage"):
        extension.renoise_upsample(0, 0, 0, False, 0, 1, 1, 4, 4, 1.0, 1.0, 2**32, 0.0)
    with pytest.raises(ValueError, match="x is missing"):
        extension.renoise_upsample(0, 0, 0, False, 0, 1, 1, 4, 4, 1.0, 1.0, 1, 0.0)
    with pytest.raises(ValueError, match="v_cond is missing"):
        extension.cfg_euler(0, 0, (0, 0, 0), (0, 0, 0), (0, 0, 0), 1, 1, 1.0, 1.0)
    with pytest.raises(ValueError, match="negative"):
        extension.cfg_euler(0, 0, (0, 0, 0), (0, 0, 0), (0, 0, 0), -1, 1, 1.0, 1.0)


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
