"""Conventions of latents: raw to normalised, packed to spatial, Euler's to unit variance."""

import pytest
import torch

from msdd_fast.errors import InputError
from msdd_fast.families.pid.latents import LATENTS, from_euler, normalise, unpack
from tests.families.pid.models import latents


def test_affine_latents():
    z = latents(2, 16, 3, 5)
    torch.testing.assert_close(normalise("flux", z), 0.3611 * (z - 0.1159))
    torch.testing.assert_close(normalise("sd3", z), 1.5305 * (z - 0.0609))
    torch.testing.assert_close(normalise("sdxl", z[:, :4]), 0.13025 * z[:, :4])
    qwen = normalise("qwenimage", z)
    torch.testing.assert_close(qwen[:, 3], (z[:, 3] - 0.1075) / 2.6558)
    torch.testing.assert_close(qwen[:, 15], (z[:, 15] + 0.2921) / 1.9160)


def test_flux2_is_packed_and_batch_normalised():
    z, mean, variance = latents(2, 32, 4, 6), latents(128, seed=1), latents(128, seed=2).square()
    out = normalise("flux2", z, mean, variance)
    assert out.shape == (2, 128, 2, 3)
    c, i, j = 5, 1, 0
    k = c * 4 + i * 2 + j
    torch.testing.assert_close(out[1, k, 1, 2], (z[1, c, 3, 4] - mean[k]) / (variance[k] + 1e-4).sqrt())


def test_features_are_layer_normalised():
    z = 3 * latents(1, 1152, 2, 2) + 1
    out = normalise("siglip", z)
    torch.testing.assert_close(out.mean(1), torch.zeros(1, 2, 2), atol=1e-5, rtol=0)
    torch.testing.assert_close(out.var(1, correction=0), torch.ones(1, 2, 2), atol=1e-4, rtol=0)
    z, mean, variance = latents(1, 768, 2, 2), latents(768, 2, 2, seed=1), latents(768, 2, 2, seed=2).square()
    normed = (z - z.mean(1)) / (z.var(1, correction=0) + 1e-6).sqrt()
    torch.testing.assert_close(normalise("dinov2", z, mean, variance), (normed - mean) / (variance + 1e-5).sqrt())


@pytest.mark.parametrize("patch", [1, 2])
def test_packed_tokens(patch):
    z = latents(2, 16, 4, 6)
    packed = torch.nn.functional.pixel_unshuffle(z, patch).flatten(2).transpose(1, 2)
    assert torch.equal(unpack(packed, 4, 6), z)


def test_eulers_latents_have_unit_variance():
    z, s = from_euler(torch.full((1, 4, 2, 2), 2.0), 3.0)
    assert float(z[0, 0, 0, 0]) == pytest.approx(2 / 10**0.5) and s == pytest.approx(3 / 10**0.5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: normalise("flux", latents(1, 4, 2, 2)), r"raw must have shape \(B, 16, h, w\)"),
        (lambda: normalise("flux2", latents(1, 32, 3, 2)), "sides multiples of 2"),
        (lambda: normalise("flux2", latents(1, 32, 2, 2)), "need statistics .* from the file of the VAE of FLUX.2"),
        (lambda: normalise("flux", latents(1, 16, 2, 2), torch.ones(16), torch.ones(16)), "need no statistics"),
        (
            lambda: normalise("flux2", latents(1, 32, 2, 2), torch.ones(32), torch.ones(32)),
            r"mean must have shape \(128,\)",
        ),
        (lambda: unpack(latents(1, 7, 64), 4, 6), "packed must have shape"),
        (lambda: unpack(latents(1, 6, 30), 4, 6), "packed must have shape"),
    ],
)
def test_errors(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_every_kind_says_whose_it_is():
    for kind in LATENTS.values():
        assert kind.vae and kind.raw_channels * kind.patch**2 == kind.channels
        assert len(kind.mean) in (1, kind.channels) and len(kind.std) == len(kind.mean)
