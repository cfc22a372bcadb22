"""renoise_upsample on every backend against the eager reference."""

import pytest
import torch

from msdd_fast import ops
from msdd_fast.diffusion import noise
from msdd_fast.errors import InputError

SHAPES = [(2, 3, 3, 5), (1, 1, 1, 1), (3, 4, 2, 8), (1, 3, 7, 33)]


def case(shape, device, dtype=torch.float32, channels_last=False):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    return x, torch.tensor([2**40 + 7 * i for i in range(shape[0])], device=device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_against_eager(backend, device, assert_rounded, shape, dtype):
    x, seeds = case(shape, device, dtype)
    exact = ops.renoise_upsample(x.float(), 0.6, 0.7, seeds, 3, -1 / 3, backend="eager")
    assert_rounded(ops.renoise_upsample(x, 0.6, 0.7, seeds, 3, -1 / 3, backend=backend), exact, dtype)


@pytest.mark.parametrize("correlation", [-1 / 3, 0.0, 1 / 3, 0.9])
@pytest.mark.parametrize("stage", [0, 4, 2**32 - 1])
def test_noise_alone(backend, device, correlation, stage):
    """alpha 0, beta 1: the noise itself, to 1e-6, from the same integers."""
    x, seeds = case((2, 3, 5, 6), device)
    out = ops.renoise_upsample(x, 0.0, 1.0, seeds, stage, correlation, backend=backend)
    expected = noise.renoise_noise(seeds.cpu(), (3, 10, 12), stage, correlation)
    torch.testing.assert_close(out.cpu(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_channels_last(backend, device, assert_rounded, dtype):
    x, seeds = case((2, 3, 5, 6), device, dtype, channels_last=True)
    out = ops.renoise_upsample(x, 0.6, 0.7, seeds, 1, backend=backend)
    assert out.is_contiguous(memory_format=torch.channels_last)
    exact = ops.renoise_upsample(x.float().contiguous(), 0.6, 0.7, seeds, 1, backend="eager")
    assert_rounded(out, exact, dtype)
    eager = ops.renoise_upsample(x, 0.6, 0.7, seeds, 1, backend="eager")
    assert eager.is_contiguous(memory_format=torch.channels_last)


def test_other_strides(backend, device):
    x, seeds = case((2, 3, 5, 6), device)
    view = x.transpose(2, 3)
    out = ops.renoise_upsample(view, 0.6, 0.7, seeds, 1, backend=backend)
    expected = ops.renoise_upsample(view.contiguous(), 0.6, 0.7, seeds, 1, backend=backend)
    assert out.is_contiguous() and torch.equal(out, expected)


def test_any_split_of_the_batch_is_identical(backend, device):
    x, seeds = case((4, 3, 4, 5), device, torch.bfloat16)
    whole = ops.renoise_upsample(x, 0.6, 0.7, seeds, 2, backend=backend)
    for cut in (1, 3):
        parts = [
            ops.renoise_upsample(x[s], 0.6, 0.7, seeds[s], 2, backend=backend) for s in (slice(cut), slice(cut, 4))
        ]
        assert torch.equal(torch.cat(parts), whole)


def test_empty_batch_and_device_scalars(backend, device):
    x, seeds = case((2, 3, 4, 4), device)
    assert ops.renoise_upsample(x[:0], 0.6, 0.7, seeds[:0], 2, backend=backend).shape == (0, 3, 8, 8)
    alpha, beta = torch.tensor(0.6, device=device), torch.tensor(0.7, device=device)
    by_tensor = ops.renoise_upsample(x, alpha, beta, seeds, 2, backend=backend)
    assert torch.equal(by_tensor, ops.renoise_upsample(x, 0.6, 0.7, seeds, 2, backend=backend))


BAD = [
    (dict(x=[1.0]), "x must be a tensor, got list"),
    (dict(x=torch.zeros(3, 4, 4)), r"x must be a tensor \(B, C, H, W\), got \(3, 4, 4\)"),
    (dict(x=torch.zeros(2, 3, 4, 4, dtype=torch.float64)), "x must be float32, bfloat16 or float16, got torch.float64"),
    (dict(seeds=torch.zeros(3, dtype=torch.int64)), "seeds must hold 2 values, one per image, got 3"),
    (dict(seeds=torch.zeros(2)), r"seeds must be an int64 tensor \(B,\), got torch.float32 \(2,\)"),
    (dict(seeds=torch.tensor([0, -1])), r"seeds must be in \[0, 2\^63\), got -1"),
    (dict(seeds=torch.zeros(2, dtype=torch.int64, device="meta")), "seeds must be on the device of x, cpu, got meta"),
    (dict(stage=-1), r"stage must be an int in \[0, 2\^32\), got -1"),
    (dict(stage=1.5), r"stage must be an int in \[0, 2\^32\), got 1.5"),
    (dict(correlation=1.0), r"correlation must be in \[-1/3, 1\), got 1.0"),
    (dict(alpha=torch.zeros(2)), r"alpha must be one number, got a tensor of shape \(2,\)"),
    (dict(beta=torch.zeros((), device="meta")), "beta must be on cpu, got meta"),
]


@pytest.mark.parametrize("name", ["eager", "cpu", "triton"])
@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_input_has_one_text_on_every_backend(name, change, message):
    arguments = dict(
        x=torch.zeros(2, 3, 4, 4),
        alpha=0.5,
        beta=0.5,
        seeds=torch.zeros(2, dtype=torch.int64),
        stage=1,
        correlation=0.0,
    )
    with pytest.raises(InputError, match=message):
        ops.renoise_upsample(**{**arguments, **change}, backend=name)
