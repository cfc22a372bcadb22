"""stage_transition on every backend against the eager reference, and that against renoise_upsample of the image."""

import pytest
import torch

from msdd_fast import ops
from msdd_fast.diffusion import noise
from msdd_fast.diffusion.patch_rows import patchify, unpatchify_rows
from msdd_fast.errors import InputError

DT, ALPHA, BETA, SCALE = -0.3, 0.6, 0.7, 1.7
# Grid, images, channels, patch size: one block in a run, two and four; patches that are no power of two.
SHAPES = [(2, 2, 3, 8), (3, 1, 1, 2), (1, 2, 3, 4), (2, 1, 3, 6), (1, 1, 3, 16)]


def case(shape, device, dtype=torch.float32):
    """x, the velocities of both branches in one tensor (N, 2B, F), and seeds."""
    grid, batch, channels, p = shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(grid**2, batch, channels * p * p, generator=generator).to(device, dtype)
    both = torch.randn(grid**2, 2 * batch, channels * p * p, generator=generator).to(device, dtype)
    return x, both, torch.tensor([2**40 + 7 * i for i in range(batch)], device=device)


def transition(x, both, seeds, p, guided=True, backend="eager", correlation=-1 / 3, stage=2):
    batch = x.shape[1]
    guidance = (both[:, batch:], SCALE) if guided else (None, None)
    return ops.stage_transition(
        x, both[:, :batch], DT, ALPHA, BETA, seeds, stage, p, correlation, *guidance, backend=backend
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_against_eager(backend, device, assert_rounded, shape, dtype):
    x, both, seeds = case(shape, device, dtype)
    for guided in (False, True):
        exact = transition(x.float(), both.float(), seeds, shape[3], guided)
        for name in (backend, "eager"):
            out = transition(x, both, seeds, shape[3], guided, name)
            assert out.is_contiguous() and out.shape == (4 * len(x), *x.shape[1:])
            assert_rounded(out, exact, dtype)


def test_eager_is_the_formula_on_images():
    """In float64, with the noise of the reference."""
    x, both, seeds = case((2, 2, 3, 8), "cpu")
    v, v_uncond = both.double().split(2, dim=1)
    end = unpatchify_rows(x.double() + DT * (v_uncond + SCALE * (v - v_uncond)), 8)
    n = noise.renoise_noise(seeds, (3, 32, 32), 2, -1 / 3).double()
    up = end.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    torch.testing.assert_close(
        transition(x, both, seeds, 8).double(), patchify(ALPHA * up + BETA * n, 8), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("correlation", [-1 / 3, 0.0, 0.9])
@pytest.mark.parametrize("stage", [0, 2**32 - 1])
def test_noise_alone(backend, device, correlation, stage):
    """alpha 0, beta 1: the numbers of renoise_upsample, to 1e-6."""
    x, both, seeds = case((2, 2, 3, 8), device)
    out = ops.stage_transition(x, both[:, :2], 0.0, 0.0, 1.0, seeds, stage, 8, correlation, backend=backend)
    expected = noise.renoise_noise(seeds.cpu(), (3, 32, 32), stage, correlation)
    torch.testing.assert_close(unpatchify_rows(out.cpu(), 8), expected, rtol=0, atol=1e-6)


def test_mixed_dtypes_and_strides(backend, device, assert_rounded):
    """x decides the dtype; neither order of tokens and images, nor gaps, nor strided features change a bit."""
    x, both, seeds = case((2, 2, 3, 4), device)
    mixed = ops.stage_transition(
        x, both[:, :2].bfloat16(), DT, ALPHA, BETA, seeds, 1, 4, 0.0, both[:, 2:].half(), SCALE, backend=backend
    )
    exact = ops.stage_transition(
        x, both[:, :2].bfloat16(), DT, ALPHA, BETA, seeds, 1, 4, 0.0, both[:, 2:].half(), SCALE, backend="eager"
    )
    assert_rounded(mixed, exact, torch.float32)
    expected = transition(x, both.contiguous(), seeds, 4, backend=backend)
    batch_major = both.transpose(0, 1).contiguous().transpose(0, 1)
    features_apart = both.transpose(1, 2).contiguous().transpose(1, 2)
    gaps = x.repeat(1, 2, 1)[:, :2]
    for other_x, other in ((x, batch_major), (x, features_apart), (gaps, both)):
        assert torch.equal(transition(other_x, other, seeds, 4, backend=backend), expected)


def test_any_split_of_the_batch_is_identical(backend, device):
    x, both, seeds = case((2, 3, 3, 4), device, torch.bfloat16)
    whole = transition(x, both, seeds, 4, guided=False, backend=backend)
    for cut in (1, 2):
        parts = [
            transition(x[:, s], both[:, s], seeds[s], 4, guided=False, backend=backend)
            for s in (slice(cut), slice(cut, 3))
        ]
        assert torch.equal(torch.cat(parts, dim=1), whole)


def test_empty_input_and_device_scalars(backend, device):
    x, both, seeds = case((2, 2, 3, 4), device)
    assert transition(x[:, :0], both[:, :0], seeds[:0], 4, False, backend).shape == (16, 0, 48)
    assert transition(x[:0], both[:0], seeds, 4, True, backend).shape == (0, 2, 48)
    dt, alpha, beta, scale = (torch.tensor(s, device=device) for s in (DT, ALPHA, BETA, SCALE))
    by_tensor = ops.stage_transition(
        x, both[:, :2], dt, alpha, beta, seeds, 2, 4, -1 / 3, both[:, 2:], scale, backend=backend
    )
    assert torch.equal(by_tensor, transition(x, both, seeds, 4, backend=backend))


def test_large_means(backend, device):
    """E cancels: as near to float64 as eager, up to a factor of two."""
    x, both, seeds = case((2, 1, 3, 4), device)
    x = x + 1000.0
    v = torch.full_like(x, 1000.0 / -DT) + both[:, :1]
    exact = x.double() + DT * v.double()
    exact = ALPHA * unpatchify_rows(exact, 4).repeat_interleave(2, 2).repeat_interleave(2, 3)
    errors = {}
    for name in (backend, "eager"):
        out = ops.stage_transition(x, v, DT, ALPHA, 0.0, seeds, 1, 4, backend=name)
        errors[name] = (unpatchify_rows(out, 4).double() - exact).abs().max().item()
    assert errors[backend] <= 2 * errors["eager"] + 1e-6


def test_eager_is_differentiable():
    x, both, seeds = case((1, 1, 3, 2), "cpu")
    x, both = x.requires_grad_(), both.requires_grad_()
    ops.stage_transition(x, both[:, :1], DT, ALPHA, BETA, seeds, 1, 2, 0.0, both[:, 1:], SCALE).sum().backward()
    torch.testing.assert_close(x.grad, torch.full_like(x, 4 * ALPHA))
    assert both.grad.abs().min() > 0


ROWS = torch.zeros(4, 2, 48)
BAD = [
    (dict(x=[1.0]), "x must be a tensor, got list"),
    (dict(x=torch.zeros(4, 48)), r"x must be \(g\*g, B, C\*16\) for patch_size 4, got \(4, 48\)"),
    (dict(x=torch.zeros(5, 2, 48)), r"x must be \(g\*g, B, C\*16\) for patch_size 4, got \(5, 2, 48\)"),
    (dict(x=torch.zeros(4, 2, 50)), r"x must be \(g\*g, B, C\*16\) for patch_size 4, got \(4, 2, 50\)"),
    (dict(x=ROWS.double()), "x must be float32, bfloat16 or float16, got torch.float64"),
    (dict(v=ROWS[:1]), r"v must have the shape of x, \(4, 2, 48\), got \(1, 2, 48\)"),
    (dict(v_uncond=ROWS), "v_uncond and scale must be given together, got Tensor and none"),
    (dict(scale=1.5), "v_uncond and scale must be given together, got none and float"),
    (dict(v_uncond=ROWS.to("meta"), scale=1.5), "v_uncond must be on the device of x, cpu, got meta"),
    (dict(patch_size=3), r"patch_size must be an even int >= 2 \(noise comes in 2x2 blocks\), got 3"),
    (dict(patch_size=4.0), r"patch_size must be an even int >= 2 \(noise comes in 2x2 blocks\), got 4.0"),
    (dict(seeds=torch.zeros(3, dtype=torch.int64)), "seeds must hold 2 values, one per image, got 3"),
    (dict(seeds=torch.tensor([0, -1])), r"seeds must be in \[0, 2\^63\), got -1"),
    (dict(stage=-1), r"stage must be an int in \[0, 2\^32\), got -1"),
    (dict(correlation=1.0), r"correlation must be in \[-1/3, 1\), got 1.0"),
    (dict(dt=torch.zeros(2)), r"dt must be one number, got a tensor of shape \(2,\)"),
    (dict(beta=torch.zeros((), device="meta")), "beta must be on cpu, got meta"),
]


@pytest.mark.parametrize("name", ["eager", "cpu", "triton"])
@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_input_has_one_text_on_every_backend(name, change, message):
    arguments = dict(x=ROWS, v=ROWS, dt=-0.5, alpha=0.5, beta=0.5, seeds=torch.zeros(2, dtype=torch.int64))
    arguments |= dict(stage=1, patch_size=4)
    with pytest.raises(InputError, match=message):
        ops.stage_transition(**{**arguments, **change}, backend=name)
