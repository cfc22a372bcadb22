"""The samplers on networks whose answer is known, noise by seed, and the arguments of a decode."""

import math
from dataclasses import replace

import pytest
import torch

from msdd_fast.diffusion.noise import renoise_noise, resolve_seeds, start_noise
from msdd_fast.errors import InputError
from msdd_fast.families.pid import sampler
from msdd_fast.families.pid.caption import save_features
from tests.families.pid.models import TINY, captions, latents, random_tokenizer

IMAGE = latents(2, 3, 8, 8, seed=5).clamp(-1, 1)
UNDISTILLED = replace(TINY, sampler="dpm", sampling=replace(TINY.sampling, steps=3, cfg_scale=3.0))


@pytest.fixture(scope="module")
def tok():
    return random_tokenizer()


@pytest.fixture(scope="module")
def undistilled():
    return random_tokenizer(UNDISTILLED)


def exact_velocity(x, t):
    """Of the one image: noise minus image on the line through x."""
    return (x - IMAGE) / t


def test_times():
    assert sampler.distilled_times(1).tolist() == [1, 0]
    for steps, expected in ((2, (0.999, 0.634, 0)), (3, (0.999, 0.866, 0.342, 0)), (4, sampler.TIMES)):
        assert sampler.distilled_times(steps).tolist() == torch.tensor(expected).tolist()
    fed = [float(sampler.TIMES[i]) * 1000 for i in range(4)]
    assert [1000 * float(t) for t in sampler.distilled_times(4)[:4].float() * 1] == pytest.approx(fed, abs=1e-4)
    with pytest.raises(InputError, match="steps must be 1 to 4 for distilled PiD weights, got 5"):
        sampler.distilled_times(5)


@pytest.mark.parametrize("kind", ["sde", "ode"])
@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_a_perfect_network_gives_its_image(kind, steps):
    start, *noises = (latents(2, 3, 8, 8, seed=i) for i in range(steps))
    image, _, _ = sampler.sample_distilled(exact_velocity, start, sampler.distilled_times(steps), kind, noises=noises)
    torch.testing.assert_close(image, IMAGE, rtol=0, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 2, 5, 25])
def test_the_solver_gives_it_too(steps):
    image = sampler.sample_undistilled(exact_velocity, None, 1.0, latents(2, 3, 8, 8), steps, 6.0)
    torch.testing.assert_close(image, IMAGE, rtol=0, atol=2e-3)


def test_the_solver_is_of_second_order():
    """On dx/dt = v of a Gaussian image, whose flow is known, halving the steps' length quarters the error."""
    spread = 0.7

    def velocity(x, t):
        variance = (1 - t) ** 2 * spread**2 + t**2
        return x * (t - (1 - t) * spread**2) / variance

    start = latents(1, 3, 8, 8).double().float()
    errors = []
    for steps in (20, 40):
        tau = sampler.solver_steps(steps, 6.0)[0].time
        exact = start * spread / ((1 - tau) ** 2 * spread**2 + tau**2).sqrt()
        errors.append((sampler.sample_undistilled(velocity, None, 1.0, start, steps, 6.0) - exact).abs().max())
    assert errors[1] < errors[0] / 2.5


def test_shifts():
    assert sampler.shift_of(UNDISTILLED, 2048, 2048) == 6.0
    assert sampler.shift_of(UNDISTILLED, 1024, 4096) == pytest.approx(6.0)
    assert sampler.shift_of(UNDISTILLED, 4096, 4096) == pytest.approx(6 * math.sqrt(2))
    assert sampler.shift_of(replace(UNDISTILLED, shift=4.0), 64, 64) == 4.0
    times = [float(s.time) for s in sampler.solver_steps(25, 6.0)]
    assert times[0] == pytest.approx(0.99983, abs=1e-5) and times == sorted(times, reverse=True)


def test_noise_by_seed(tok):
    """Every image has a stream of its own: the start, then one number for each step."""
    z, given = latents(2, 4, 1, 1), {"text": captions(2), "sigma": 0.1}
    both = tok.decode(z, 5, **given)
    torch.testing.assert_close(tok.decode(z[1:], 6, text=captions(2)[1:], sigma=0.1), both[1:], rtol=0, atol=1e-5)
    seeds = resolve_seeds(5, 2)
    noise = [start_noise(seeds, (3, 32, 32)), *(renoise_noise(seeds, (3, 32, 32), i, 0.0) for i in (1, 2, 3))]
    torch.testing.assert_close(tok.decode(z, noise=noise, **given), both, rtol=0, atol=1e-5)
    assert (tok.decode(z, 6, **given) - both).abs().max() > 0.01


def test_sizes(tok):
    z, text = latents(1, 4, 2, 3), captions(1)
    assert tok.decode(z, steps=1, text=text).shape == (1, 3, 64, 96)
    assert tok.decode(z, steps=1, text=text, height=80, width=48).shape == (1, 3, 80, 48)
    same = tok.decode(z, steps=1, text=text, height=64, width=96)
    assert torch.equal(same, tok.decode(z, steps=1, text=text))


def test_texts(tok, tmp_path):
    z, text = latents(2, 4, 2, 2), captions(1)
    expected = tok.decode(z, steps=1, text=text.expand(2, -1, -1))
    assert torch.equal(tok.decode(z, steps=1, text=text), expected)
    assert torch.equal(tok.decode(z, steps=1, text=text[0]), expected)
    save_features(text[0], tmp_path / "empty.safetensors")
    assert torch.equal(tok.decode(z, steps=1, text=tmp_path / "empty.safetensors"), expected)
    longer = torch.cat([text, captions(1, rows=3, seed=1)], dim=1)
    assert torch.equal(tok.decode(z, steps=1, text=longer), expected)


def test_guidance(undistilled):
    z, text, null = latents(1, 4, 1, 1), captions(1), captions(1, rows=4, seed=2)
    guided = undistilled.decode(z, text=text, null_text=null)
    plain = undistilled.decode(z, cfg_scale=1.0, text=text)
    assert (guided - plain).abs().max() > 0.01
    one = undistilled.decode(z, cfg_scale=1.5, text=text, null_text=text)
    torch.testing.assert_close(one, plain, rtol=0, atol=2e-3)


def test_the_callback_sees_the_image(tok):
    seen = []
    image = tok.decode(latents(1, 4, 1, 1), text=captions(1), stage_callback=seen.append)
    assert len(seen) == 1 and seen[0].stage == 0 and torch.equal(seen[0].state, image)
    assert seen[0].clean.shape == image.shape


GIVEN = {"text": captions(1)}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "text must be caption features"),
        ({"text": latents(1, 5, 23)}, r"text must have shape \(1, T, 24\)"),
        ({"text": torch.zeros(1, 5, 24, dtype=torch.int64)}, "text must be floating point"),
        ({"text": latents(3, 5, 24)}, r"text must have shape \(1, T, 24\)"),
        ({"text": "/nowhere.safetensors"}, "text: /nowhere.safetensors is missing"),
        ({**GIVEN, "sigma": 1.5}, r"sigma must be in \[0, 1\], got 1.5"),
        ({**GIVEN, "sigma": float("nan")}, r"sigma must be in \[0, 1\], got nan"),
        ({**GIVEN, "sigma": [0.1, 0.2]}, "sigma must be a number or 1 numbers"),
        ({**GIVEN, "sigma": "high"}, "sigma must be a number"),
        ({**GIVEN, "height": 70}, "height must be a multiple of 16, got 70"),
        ({**GIVEN, "width": -16}, "width must be an integer >= 1"),
        ({**GIVEN, "steps": 5}, "steps must be 1 to 4"),
        ({**GIVEN, "cfg_scale": 2.0}, "cfg_scale must be 1 for an PID tokenizer"),
        ({**GIVEN, "null_text": captions(1)}, "null_text is for cfg_scale other than 1"),
        ({**GIVEN, "prompt": "a cat"}, "takes no argument 'prompt', only text, sigma, height"),
        ({**GIVEN, "noise": [latents(1, 3, 64, 64)]}, "noise must hold 4 tensors"),
    ],
)
def test_errors(tok, given, message):
    with pytest.raises(InputError, match=message):
        tok.decode(latents(1, 4, 2, 2), **given)


def test_guidance_needs_something_to_guide_away_from(undistilled):
    with pytest.raises(InputError, match="null_text must be given with cfg_scale=3"):
        undistilled.decode(latents(1, 4, 2, 2), **GIVEN)


def test_there_is_no_encoder(tok):
    with pytest.raises(InputError, match="no encoder: it decodes latents of the VAE of SDXL"):
        tok.encode(latents(1, 3, 64, 64))
