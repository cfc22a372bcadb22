"""The definition of the random numbers: published vectors, accuracy, statistics, independence."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from msdd_fast.diffusion import noise
from msdd_fast.errors import InputError

SHAPE = (3, 64, 64)
CORRELATIONS = [-1 / 3, 0.0, 1 / 3]


def words(*values: int) -> tuple[Tensor, ...]:
    return tuple(torch.tensor([v], dtype=torch.int64) for v in values)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        # The third published vector: digits of pi, different in every word.
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter, key, expected):
    result = noise.philox(words(*counter), words(*key))
    assert [int(w) for w in result] == list(expected)


def test_counter_and_key_layout():
    """Counter (block, stage, 0, purpose), key (low, high half of the seed)."""
    seed = (0x12345678 << 32) | 0x9ABCDEF0
    result = noise.block_words(torch.tensor([seed]), 6, 3, noise.PURPOSE_RENOISE)
    for block in range(6):
        expected = noise.philox(words(block, 3, 0, 1), words(0x9ABCDEF0, 0x12345678))
        assert [int(w[0, block]) for w in result] == [int(w) for w in expected]


def test_box_muller_is_accurate():
    generator = torch.Generator().manual_seed(0)
    edges = torch.tensor([0, 1, 255, 256, 2**29, 2**30, 2**31 - 1, 2**31, 3 * 2**29, 2**32 - 1])
    radius = torch.cat([torch.randint(0, 2**32, (200_000,), generator=generator), edges.repeat_interleave(10)])
    angle = torch.cat([torch.randint(0, 2**32, (200_000,), generator=generator), edges.repeat(10)])
    x, y = noise.box_muller(radius, angle)

    r, a = radius.numpy(), angle.numpy()
    length = np.sqrt(-2.0 * np.log(((r >> 8) + 1) * 2.0**-24))
    theta = np.pi / 4 * ((a >> 6 & 0x7FFFFF) * 2 + 1) * 2.0**-24
    swap = (a >> 31).astype(bool)
    x64 = length * np.where(swap, np.sin(theta), np.cos(theta)) * np.where(a >> 30 & 1, -1.0, 1.0)
    y64 = length * np.where(swap, np.cos(theta), np.sin(theta)) * np.where(a >> 29 & 1, -1.0, 1.0)
    np.testing.assert_allclose(x.numpy(), x64, rtol=0, atol=1e-6)
    np.testing.assert_allclose(y.numpy(), y64, rtol=0, atol=1e-6)


@pytest.mark.parametrize("correlation", CORRELATIONS)
def test_moments_and_distribution(correlation):
    """Moments and Kolmogorov-Smirnov against the normal, as narrow as 196,608 samples allow."""
    seeds = noise.resolve_seeds(17, 16)
    sample = noise.renoise_noise(seeds, SHAPE, 1, correlation).double().flatten()
    # Correlation inside a block inflates (rho > 0) or deflates the error of the mean: var = (1 + 3 rho) / n.
    count = sample.numel()
    assert abs(float(sample.mean())) < 5 * math.sqrt(max(1 + 3 * correlation, 1e-8) / count)
    assert float(sample.var()) == pytest.approx(1.0, abs=5 * math.sqrt(2 * (1 + 3 * correlation**2) / count))
    assert float((sample**3).mean()) == pytest.approx(0.0, abs=5 * math.sqrt(30 / count))
    assert float((sample**4).mean()) == pytest.approx(3.0, abs=5 * math.sqrt(200 / count))
    # One pixel per block is an independent sample, as the test requires.
    independent = noise.renoise_noise(seeds, SHAPE, 1, correlation)[..., ::2, ::2]
    assert stats.kstest(independent.flatten().double().numpy(), "norm").pvalue > 1e-3


def test_start_noise_is_normal():
    sample = noise.start_noise(noise.resolve_seeds(3, 8), SHAPE)
    assert sample.dtype == torch.float32 and sample.shape == (8, *SHAPE)
    assert stats.kstest(sample.flatten().double().numpy(), "norm").pvalue > 1e-3


@pytest.mark.parametrize("correlation", CORRELATIONS)
def test_correlation_inside_and_between_blocks(correlation):
    image = noise.renoise_noise(noise.resolve_seeds(5, 16), SHAPE, 2, correlation).double()
    pixels = [image[..., i::2, j::2].flatten() for i in (0, 1) for j in (0, 1)]  # TL, TR, BL, BR
    bound = 5 / math.sqrt(pixels[0].numel())
    for a in range(4):
        for b in range(a):
            assert float((pixels[a] * pixels[b]).mean()) == pytest.approx(correlation, abs=bound)
    right = image[..., :, 1:-1:2] * image[..., :, 2::2]  # neighbours on both sides of a border between blocks
    assert float(right.mean()) == pytest.approx(0.0, abs=2 * bound)


def test_blocks_sum_to_zero_at_minus_one_third():
    image = noise.renoise_noise(noise.resolve_seeds(5, 2), SHAPE, 1, -1 / 3)
    assert float(torch.nn.functional.avg_pool2d(image, 2).abs().max()) < 1e-6


def test_images_stages_channels_and_purposes_are_independent():
    seeds = noise.resolve_seeds(0, 2)
    fields = {
        "image 0, stage 1": noise.renoise_noise(seeds, SHAPE, 1, 0.0)[0],
        "image 1, stage 1": noise.renoise_noise(seeds, SHAPE, 1, 0.0)[1],
        "image 0, stage 2": noise.renoise_noise(seeds, SHAPE, 2, 0.0)[0],
        "image 0, start": noise.start_noise(seeds, SHAPE)[0],
        "image 0, stage 0": noise.renoise_noise(seeds, SHAPE, 0, 0.0)[0],  # differs from start by purpose alone
    }
    channels = {f"{name}, channel {c}": f[c].flatten().double() for name, f in fields.items() for c in range(3)}
    matrix = np.corrcoef(torch.stack(list(channels.values())).numpy())
    np.fill_diagonal(matrix, 0.0)
    assert np.abs(matrix).max() < 5 / math.sqrt(SHAPE[1] * SHAPE[2])


@pytest.mark.parametrize("correlation", CORRELATIONS)
def test_an_image_does_not_depend_on_its_batch(correlation):
    seeds = torch.tensor([9, 2**63 - 1, 0, 123456789])
    together = noise.renoise_noise(seeds, (3, 10, 6), 3, correlation)
    start = noise.start_noise(seeds, (3, 10, 6))
    for i in range(len(seeds)):
        assert torch.equal(together[i : i + 1], noise.renoise_noise(seeds[i : i + 1], (3, 10, 6), 3, correlation))
        assert torch.equal(start[i : i + 1], noise.start_noise(seeds[i : i + 1], (3, 10, 6)))


def test_blocks_are_counted_in_channel_row_column_order():
    """Pixel (c, 2i+di, 2j+dj) is word 2 di + dj of block c*Hin*Win + i*Win + j."""
    seeds = torch.tensor([4])
    image = noise.start_noise(seeds, (2, 4, 6))
    flat = noise.block_normals(seeds, (1, 2, 2 * 12), 0, noise.PURPOSE_START).view(12, 4)
    for c in range(2):
        for i in range(2):
            for j in range(3):
                block = flat[c * 6 + i * 3 + j]
                assert torch.equal(image[0, c, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].flatten(), block)


def test_resolve_seeds():
    assert noise.resolve_seeds(7, 3).tolist() == [7, 8, 9]
    assert noise.resolve_seeds([5, 1], 2).tolist() == [5, 1]
    assert noise.resolve_seeds(torch.tensor([5, 1], dtype=torch.int32), 2).tolist() == [5, 1]
    assert noise.resolve_seeds(2**63 - 1, 1).tolist() == [2**63 - 1]
    assert noise.resolve_seeds(0, 0).shape == (0,)


@pytest.mark.parametrize(
    ("seed", "got"),
    [
        (-1, "-1"),
        (2**63, str(2**63)),
        (2**63 - 1, str(2**63)),  # the second image's seed is out of range
        ([1, 2, 3], "got 3"),
        ([1, True], "True"),
        ([1, 2.0], "2.0"),
        (True, "bool"),
        ("12", "str"),
        (1.5, "float"),
        (None, "NoneType"),
        (torch.tensor([1.0, 2.0]), "float32"),
    ],
)
def test_bad_seeds_are_refused(seed, got):
    with pytest.raises(InputError, match="seed must be") as error:
        noise.resolve_seeds(seed, 2)
    assert got in str(error.value)


def test_bad_shapes_and_correlations_are_refused():
    seeds = torch.tensor([0])
    with pytest.raises(InputError, match=r"shape must have even height and width.*5x4"):
        noise.start_noise(seeds, (3, 5, 4))
    for correlation in (1.0, -0.34, float("nan")):
        with pytest.raises(InputError, match=r"correlation must be in \[-1/3, 1\)"):
            noise.renoise_noise(seeds, (3, 4, 4), 1, correlation)
