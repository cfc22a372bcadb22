"""The C++ noise against the torch reference, and its wrappers' errors."""

from __future__ import annotations

import re

import pytest
import torch
from conftest import ROOT

from msdd_fast import backends, native, noise
from msdd_fast.errors import InputError

if not backends.extension_status()[0]:
    pytest.skip(f"msdd_fast._C {backends.extension_status()[1]}", allow_module_level=True)

SEEDS = torch.tensor([0, 2**63 - 1, 0x123456789ABCDEF, 42, 7])
# Rows of 16, 32 and 3 blocks: whole vectors, and tails only; one image big enough for several threads.
SHAPES = [(3, 32, 32), (1, 2, 2), (3, 10, 70), (2, 64, 6), (3, 256, 256)]


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
    actual = native.start_noise_cpu(SEEDS, shape)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, noise.start_noise(SEEDS, shape), rtol=0, atol=1e-6)


@pytest.mark.parametrize("stage", [0, 3, 2**32 - 1])
@pytest.mark.parametrize("correlation", [-1 / 3, -0.2, 0, 0.25, 0.999])
def test_renoise_noise(stage, correlation):
    for shape in SHAPES[:4]:
        actual = native.renoise_noise_cpu(SEEDS, shape, stage, correlation)
        torch.testing.assert_close(actual, noise.renoise_noise(SEEDS, shape, stage, correlation), rtol=0, atol=1e-6)


def test_float32_minus_one_third_is_accepted():
    rounded = float(torch.tensor(-1 / 3))  # just below -1/3
    actual = native.renoise_noise_cpu(SEEDS, (3, 8, 8), 1, rounded)
    torch.testing.assert_close(actual, noise.renoise_noise(SEEDS, (3, 8, 8), 1, rounded), rtol=0, atol=1e-6)


def test_an_image_does_not_depend_on_batch_or_threads():
    shape = (3, 128, 70)
    whole = native.renoise_noise_cpu(SEEDS, shape, 2, -1 / 3)
    for cut in range(1, len(SEEDS)):
        parts = [native.renoise_noise_cpu(s, shape, 2, -1 / 3) for s in (SEEDS[:cut], SEEDS[cut:])]
        assert torch.equal(whole, torch.cat(parts))
    for threads in (1, 3, 64):
        out = torch.empty_like(whole)
        backends.load_extension().renoise_noise(
            out.data_ptr(), SEEDS.data_ptr(), *out.shape, stage=2, correlation=-1 / 3, threads=threads
        )
        assert torch.equal(whole, out)


def test_strided_seeds_and_empty_sizes():
    seeds = torch.stack([SEEDS, SEEDS + 1 - (SEEDS > 10).long()], dim=1)[:, 0]
    assert not seeds.is_contiguous()
    assert torch.equal(native.start_noise_cpu(seeds, (1, 4, 4)), native.start_noise_cpu(SEEDS, (1, 4, 4)))
    for batch, shape in [(0, (3, 4, 4)), (2, (0, 4, 4)), (2, (3, 0, 4)), (2, (3, 4, 0))]:
        assert native.start_noise_cpu(SEEDS[:batch], shape).shape == (batch, *shape)


@pytest.mark.parametrize(
    ("seeds", "shape", "message"),
    [
        ([1, 2], (3, 4, 4), r"seeds must be an int64 tensor \(B,\) on the CPU, got list"),
        (SEEDS.int(), (3, 4, 4), "seeds must be an int64 tensor.*got torch.int32"),
        (SEEDS[None], (3, 4, 4), r"seeds must be an int64 tensor.*\(1, 5\)"),
        (SEEDS.to("meta"), (3, 4, 4), "seeds must be an int64 tensor.*on meta"),
        (SEEDS, (3, 5, 4), "shape must have even height and width.*5x4"),
        (SEEDS, (4, 4), r"shape must be three non-negative ints.*\(4, 4\)"),
        (SEEDS, (3, -2, 4), "shape must be three non-negative ints"),
        (SEEDS, (3, 4.0, 4), "shape must be three non-negative ints"),
        (SEEDS, (3, 2**17, 2**18), r"shape must hold at most 2\^32 blocks"),
    ],
)
def test_bad_input_is_refused(seeds, shape, message):
    for call in (native.start_noise_cpu, lambda *a: native.renoise_noise_cpu(*a, 1, 0.0)):
        with pytest.raises(InputError, match=message):
            call(seeds, shape)


def test_bad_stage_and_correlation_are_refused():
    for stage in (-1, 2**32, 1.0, True):
        with pytest.raises(InputError, match=r"stage must be an int in \[0, 2\^32\)"):
            native.renoise_noise_cpu(SEEDS, (3, 4, 4), stage, 0.0)
    for correlation in (1.0, -0.34, float("nan")):
        with pytest.raises(InputError, match=r"correlation must be in \[-1/3, 1\)"):
            native.renoise_noise_cpu(SEEDS, (3, 4, 4), 1, correlation)


def test_the_extension_itself_refuses_what_it_cannot_do():
    """Before it touches memory: the null addresses here would crash otherwise."""
    extension = backends.load_extension()
    with pytest.raises(ValueError, match=r"even.*3x4"):
        extension.start_noise(0, 0, 1, 1, 3, 4)
    with pytest.raises(ValueError, match="negative"):
        extension.start_noise(0, 0, -1, 1, 4, 4)
    with pytest.raises(ValueError, match="threads must be at least 1, got 0"):
        extension.start_noise(0, 0, 1, 1, 4, 4, threads=0)
    with pytest.raises(ValueError, match=r"2\^32 blocks"):
        extension.start_noise(0, 0, 1, 2**40, 2**20, 2**20)
    for correlation in (1.0, -0.34, float("nan")):
        with pytest.raises(ValueError, match=r"correlation must be in \[-1/3, 1\)"):
            extension.renoise_noise(0, 0, 1, 1, 4, 4, 1, correlation)
    with pytest.raises(ValueError, match="stage"):
        extension.renoise_noise(0, 0, 1, 1, 4, 4, 2**32, 0.0)


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
