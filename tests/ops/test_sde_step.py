"""sde_step on every backend: one rounding of the estimate, the noise of the seeds, both layouts of the velocity."""

import pytest
import torch

from msdd_fast import ops
from msdd_fast.diffusion import noise as streams
from msdd_fast.errors import InputError
from tests.ops.adaln import DTYPES, randn

SEEDS = torch.tensor([3, 2**63 - 1])
NAMES = ("x", "v", "t", "t_next", "seeds", "stage", "noise", "patch_size", "clamp")
# (B, C, H, W) and a patch: more columns than a vector, tails, non-square grids, one block.
SHAPES = [((2, 3, 8, 12), 4), ((1, 1, 2, 2), 2), ((2, 3, 6, 134), 2), ((1, 4, 32, 48), 16), ((2, 1, 4, 4), 1)]


def pixels(v, patch):
    """An image as pixels of tokens (N, B, p * p, C)."""
    b, c, h, w = v.shape
    grid = v.view(b, c, h // patch, patch, w // patch, patch).permute(2, 4, 0, 3, 5, 1)
    return grid.reshape(-1, b, patch * patch, c).contiguous()


def case(shape, device, dtype=torch.float32, v_dtype=None):
    x, v, noise = (randn(*shape, seed=i) for i in range(3))
    return x.to(device, dtype), v.to(device, v_dtype or dtype), noise.to(device, dtype)


def exact(x, v, t, t_next=None, noise=None):
    """In float64, with the estimate rounded once."""
    x0 = (x.double() - torch.tensor(t).double() * v.double()).float().double()
    return x0 if t_next is None else (1 - torch.tensor(t_next).double()) * x0 + torch.tensor(t_next).double() * noise


@pytest.mark.parametrize("t", [0.999, 0.866, 0.342, 1.0])
def test_the_estimate_is_rounded_once(backend, device, t):
    """Bit for bit. Where x and t * v nearly cancel, float32 would lose most of the digits."""
    x, v, _ = case((1, 3, 16, 64), device)
    x = x + t * v
    out = ops.sde_step(x, v, t, backend=backend)
    assert torch.equal(out, (x.double() - torch.tensor(t).double().to(device) * v.double()).float())
    assert t == 1.0 or not torch.equal(out, x - t * v)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "patch"), SHAPES)
def test_given_noise(backend, device, assert_rounded, shape, patch, dtype):
    x, v, noise = case(shape, device, dtype)
    want = exact(x.cpu(), v.cpu(), 0.866, 0.634, noise.cpu().double())
    for velocity, size in ((v, None), (pixels(v, patch), patch)):
        out = ops.sde_step(x, velocity, 0.866, 0.634, noise=noise, patch_size=size, backend=backend)
        assert out.is_contiguous()
        assert_rounded(out, want, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "patch"), SHAPES)
def test_noise_of_the_seeds(backend, device, assert_rounded, shape, patch, dtype):
    x, v, _ = case(shape, device, dtype)
    seeds = SEEDS[: shape[0]]
    noise = streams.renoise_noise(seeds, shape[1:], 2, 0.0)
    want = exact(x.cpu(), v.cpu(), 0.866, 0.634, noise.double())
    for velocity, size in ((v, None), (pixels(v, patch), patch)):
        out = ops.sde_step(x, velocity, 0.866, 0.634, seeds.to(device), 2, patch_size=size, backend=backend)
        assert_rounded(out, want, dtype)


def test_both_layouts_of_v_and_wider_states_agree_to_the_bit(backend, device):
    x, v, _ = case((2, 3, 16, 32), device, torch.float32, torch.bfloat16)
    seeds = SEEDS.to(device)
    whole = ops.sde_step(x, v, 0.9, 0.5, seeds, 1, backend=backend)
    assert whole.dtype == torch.float32
    assert torch.equal(ops.sde_step(x, pixels(v, 16), 0.9, 0.5, seeds, 1, patch_size=16, backend=backend), whole)
    for i in range(2):  # an image depends on its own seed only
        alone = ops.sde_step(x[i : i + 1], v[i : i + 1], 0.9, 0.5, seeds[i : i + 1], 1, backend=backend)
        assert torch.equal(alone, whole[i : i + 1])


def test_steps_and_images_have_noise_of_their_own():
    x, v, _ = case((2, 3, 32, 32), "cpu")
    parts = [ops.sde_step(0 * x, 0 * v, 1.0, 1.0, SEEDS, stage) for stage in (1, 2)]
    parts.append(ops.start_noise(SEEDS, (3, 32, 32)))
    flat = torch.stack([p[i].flatten() for p in parts for i in range(2)])
    correlation = torch.corrcoef(flat) - torch.eye(6)
    assert correlation.abs().max() < 0.1 and (flat.std(1) - 1).abs().max() < 0.05


def test_the_last_step_is_limited(backend, device):
    x, v, _ = case((2, 3, 5, 7), device)  # odd sizes: no noise is made
    v[0, 0, 0, 0] = torch.nan
    out = ops.sde_step(3 * x, v, 0.342, clamp=True, backend=backend)
    free = ops.sde_step(3 * x, v, 0.342, backend=backend)
    assert torch.equal(out.nan_to_num(7), free.clamp(-1, 1).nan_to_num(7)) and out[0, 0, 0, 0].isnan()
    assert free.nan_to_num().abs().max() > 1


def test_odd_sizes_with_given_noise(backend, device, assert_rounded):
    x, v, noise = case((2, 2, 5, 9), device)
    out = ops.sde_step(x, v, 0.7, 0.3, noise=noise, backend=backend)
    assert_rounded(out, exact(x.cpu(), v.cpu(), 0.7, 0.3, noise.cpu().double()), torch.float32)


def test_scalars_may_be_tensors_and_v_strided(backend, device):
    x, v, noise = case((2, 3, 8, 12), device)
    t, t_next = torch.tensor(0.866, device=device), torch.tensor(0.634, device=device)
    want = ops.sde_step(x, v, 0.866, 0.634, noise=noise, backend=backend)
    turned = [a.to(memory_format=torch.channels_last) for a in (x, v, noise)]
    assert torch.equal(ops.sde_step(*turned[:2], t, t_next, noise=turned[2], backend=backend), want)


@pytest.mark.parametrize("name", ["eager", "cpu", "triton"])
@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0, 4)])
def test_empty(shape, name):
    x = torch.zeros(shape)
    assert ops.sde_step(x, x, 0.9, 0.5, SEEDS[: shape[0]], 1, backend=name).shape == shape


def test_eager_is_differentiable():
    x, v, noise = (a.requires_grad_() for a in case((1, 2, 4, 4), "cpu"))
    ops.sde_step(x, v, 0.75, 0.5, noise=noise).sum().backward()
    for a, gradient in ((x, 0.5), (v, -0.375), (noise, 0.5)):
        torch.testing.assert_close(a.grad, torch.full_like(a, gradient))


@pytest.mark.parametrize("name", ["eager", "cpu", "triton"])
def test_bad_input_has_one_text_on_every_backend(name):
    x = torch.zeros(2, 3, 8, 12)
    good = dict(x=x, v=x, t=0.9)
    rest = dict(t_next=0.5, seeds=SEEDS)
    for change, message in (
        (dict(x=None), "x must be a tensor, got NoneType"),
        (dict(x=x.double()), r"x must be float32, bfloat16 or float16, got torch\.float64"),
        (dict(v=x[:1]), r"v must be \(2, 3, 8, 12\), got \(1, 3, 8, 12\)"),
        (dict(patch_size=4), r"v must be \(6, 2, 16, 3\), got \(2, 3, 8, 12\)"),
        (dict(patch_size=3), "patch_size must be a divisor of 8 and 12, got 3"),
        (dict(patch_size=0), "patch_size must be a divisor of 8 and 12, got 0"),
        (dict(v=x.to("meta")), "v must be on the device of x, cpu, got meta"),
        (dict(t=torch.ones(2)), "t must be one number"),
        (dict(seeds=SEEDS), "seeds and noise need t_next: without it no noise is added"),
        (dict(t_next=0.5), "pass either seeds or noise with t_next"),
        (dict(rest, noise=x), "pass either seeds or noise with t_next"),
        (dict(rest, seeds=SEEDS[:1]), "seeds must hold 2 values, one per image, got 1"),
        (dict(rest, seeds=SEEDS.int()), r"seeds must be an int64 tensor \(B,\), got torch\.int32"),
        (dict(rest, stage=-1), r"stage must be an int in \[0, 2\^32\), got -1"),
        (dict(rest, x=x[..., :7], v=x[..., :7]), "x must have even height and width .* got 8x7"),
        (dict(t_next=0.5, noise=x[:1]), r"noise must have the shape of x, \(2, 3, 8, 12\), got \(1, 3, 8, 12\)"),
    ):
        with pytest.raises(InputError, match=message):
            ops.sde_step(**{**good, **change}, backend=name)
