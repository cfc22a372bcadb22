"""The multi-scale sampler: renoising statistics, seeds, CFG, clean estimates, bad input."""

import dataclasses

import pytest
import torch

import msdd_fast
from msdd_fast import ops
from msdd_fast.backends import extension_status
from msdd_fast.diffusion.config import ScheduleConfig
from msdd_fast.diffusion.noise import renoise_noise, resolve_seeds, start_noise
from msdd_fast.diffusion.schedule import StageSchedule, build_stages
from msdd_fast.errors import InputError
from msdd_fast.families.msdd.presets import PRESETS
from msdd_fast.sampling import clean_estimate, sample
from tests.perturbed import perturbed


@pytest.fixture(scope="module")
def tiny():
    return perturbed()


@pytest.fixture(scope="module")
def z():
    return torch.randn(7, 16, 32, generator=torch.Generator().manual_seed(1))


# Correlation of the renoised state inside a 2x2 block for each correlation of the noise (docs/spec.md#renoise).
@pytest.mark.parametrize(("correlation", "expected"), [(-1 / 3, 0.0), (0.0, 0.25), (1 / 3, 0.5)])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_renoised_state(correlation, expected, stage):
    """Upsampled end noise plus renoising: level start_t per pixel, and the block correlation of the table above."""
    s, e = build_stages(4)[stage], build_stages(4)[stage - 1].end_t
    batch, size = 64, 64
    generator = torch.Generator().manual_seed(stage)
    image = torch.linspace(-1, 1, size // 2).expand(batch, 3, size // 2, size // 2)
    end = (1 - e) * image + e * torch.randn(batch, 3, size // 2, size // 2, generator=generator)
    seeds = resolve_seeds(100, batch)
    state = ops.renoise_upsample(end, s.alpha, s.beta, seeds, stage, correlation, backend="eager")
    mean = (1 - s.start_t) * image.repeat_interleave(2, 2).repeat_interleave(2, 3)
    residual = (state - mean) / s.start_t
    count = residual.numel()
    blocks = residual.unfold(2, 2, 2).unfold(3, 2, 2).flatten(-2).reshape(-1, 4)
    assert abs(residual.mean()) < 5 / (count / 4) ** 0.5
    assert residual.var().item() == pytest.approx(1.0, abs=5 * (8 / count) ** 0.5)
    off = blocks.T.corrcoef()[~torch.eye(4, dtype=torch.bool)]
    assert off.numpy() == pytest.approx(expected, abs=5 / len(blocks) ** 0.5)
    # Neighbouring blocks are independent.
    across = torch.corrcoef(torch.stack([residual[..., 1:-1:2].flatten(), residual[..., 2::2].flatten()]))[0, 1]
    assert abs(across) < 5 / (count / 2) ** 0.5


def test_an_image_depends_on_its_own_seed_only(tiny, z):
    batch = tiny.decode(z, seed=5)
    for i in (0, 3, 6):
        alone = tiny.decode(z[i : i + 1], seed=5 + i)
        torch.testing.assert_close(alone, batch[i : i + 1], rtol=0, atol=1e-5)
    explicit = tiny.decode(z, seed=[5, 6, 7, 8, 9, 10, 11])
    assert torch.equal(explicit, batch)
    assert torch.equal(tiny.decode(z, seed=torch.arange(5, 12)), batch)
    assert not torch.allclose(tiny.decode(z, seed=6), batch)


def test_explicit_noise_replaces_the_seed(tiny, z):
    cfg, seeds = tiny.config, resolve_seeds(3, 7)
    shapes = [(3, r, r) for r in (8, 16, 32, 64)]
    rho = cfg.schedule.block_correlation
    noise = [start_noise(seeds, shapes[0])]
    noise += [renoise_noise(seeds, shapes[s], s, rho) for s in (1, 2, 3)]
    assert torch.equal(tiny.decode(z, noise=noise), tiny.decode(z, seed=3))


def test_cfg(tiny, z):
    """Scale 1 is one evaluation, 0 the unconditional branch, and between them it is linear in one step."""
    noise = torch.randn(7, 3, 8, 8)
    x, t = noise, torch.ones(7)
    with torch.no_grad():
        v, v_null = tiny.decoder(x, t, z), tiny.decoder(x, t, None)
        for scale, expected in ((1.0, v), (0.0, v_null), (2.0, v_null + 2 * (v - v_null))):
            torch.testing.assert_close(msdd_fast.sampling.velocity(tiny.decoder, x, t, z, scale), expected)
    calls = []
    hook = tiny.decoder.register_forward_hook(lambda *_: calls.append(1))
    tiny.decode(z, cfg_scale=1.0)
    assert len(calls) == 4
    tiny.decode(z, cfg_scale=1.5)
    hook.remove()
    assert len(calls) == 4 + 8


class Oracle(torch.nn.Module):
    """A decoder that knows the image: its velocity is exact, so the decode must return the image."""

    def __init__(self, config, image):
        super().__init__()
        self.config, self.stages = config, build_stages(config.schedule.num_stages)
        self.levels = [image]
        for _ in range(config.schedule.num_stages):
            self.levels.insert(0, torch.nn.functional.avg_pool2d(self.levels[0], 2))

    def forward(self, x, t, z):
        index = [self.config.stage_resolution(i) for i in range(len(self.stages))].index(x.shape[-1])
        s = self.stages[index]
        model = t[0].item() * 1000
        within = (model - s.timestep_min) / (s.timestep_max - s.timestep_min)
        fine = self.levels[index + 1]
        coarse = self.levels[index].repeat_interleave(2, 2).repeat_interleave(2, 3)
        # x = (1-t) ((1-e) fine + e n) + t ((1-s0) coarse + s0 n) gives n, then v = start - end.
        level = (1 - within) * s.end_t + within * s.start_t
        n = (x - (1 - within) * (1 - s.end_t) * fine - within * (1 - s.start_t) * coarse) / max(level, 1e-9)
        return ((1 - s.start_t) * coarse + s.start_t * n) - ((1 - s.end_t) * fine + s.end_t * n)


@pytest.mark.parametrize("num_stages", [1, 2, 3, 4])
@pytest.mark.parametrize("grid", ["uniform", "authors"])
@pytest.mark.parametrize("steps", [1, 3])
def test_exact_velocity_gives_the_image_and_its_clean_estimates(num_stages, grid, steps):
    config = dataclasses.replace(PRESETS["tiny"], schedule=ScheduleConfig(num_stages=num_stages, time_grid=grid))
    image = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    oracle = Oracle(config, image)
    seen = []
    out = sample(
        oracle, torch.zeros(2, 16, 32), StageSchedule(config.schedule), steps=steps, stage_callback=seen.append
    )
    torch.testing.assert_close(out, image, rtol=0, atol=2e-3)
    for result in seen:
        torch.testing.assert_close(result.clean, oracle.levels[result.stage + 1], rtol=0, atol=2e-3)


def test_clean_estimate_of_the_last_stage_is_the_end():
    stage = build_stages(4)[3]
    x, v = torch.randn(1, 3, 8, 8), torch.randn(1, 3, 8, 8)
    assert torch.equal(clean_estimate(x, v, 1.0, stage), x - v)


def test_gradients_flow_through_every_stage(tiny, z):
    latents = z[:2].clone().requires_grad_()
    sample(tiny.decoder, latents, tiny.schedule).square().mean().backward()
    assert latents.grad.abs().sum() > 0
    assert tiny.decoder.patch_embed.weight.grad is not None
    tiny.zero_grad()


def test_stage_states(tiny, z):
    states = sample(tiny.decoder, z, tiny.schedule, return_stages=True)
    assert [s.shape for s in states] == [(7, 3, r, r) for r in (8, 16, 32, 64)]
    assert states[-1].dtype == torch.float32


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(steps=0), "steps must be an integer >= 1, got 0"),
        (dict(steps=1.5), "steps must be an integer >= 1, got 1.5"),
        (dict(cfg_scale=-1.0), "cfg_scale must be a finite number >= 0, got -1.0"),
        (dict(cfg_scale=float("nan")), "cfg_scale must be a finite number >= 0, got nan"),
        (dict(seed=-1), r"seed must be in \[0, 2\^63\) for every image, got -1"),
        (dict(seed=2**63 - 1), r"seed must be in \[0, 2\^63\)"),
        (dict(seed=[1, 2]), "seed must be an int or 7 ints, one per image, got 2"),
        (dict(seed=0.5), "seed must be an int or 7 ints, got float"),
        (dict(noise=[torch.zeros(7, 3, 8, 8)]), "noise must hold 4 tensors, one per stage, got 1"),
    ],
)
def test_bad_arguments(tiny, z, kwargs, message):
    with pytest.raises(InputError, match=message):
        tiny.decode(z, **kwargs)


@pytest.mark.parametrize(
    ("z", "message"),
    [
        (torch.zeros(2, 15, 32), r"z must have shape \(B, 16, 32\), got \(2, 15, 32\)"),
        (torch.zeros(16, 32), r"z must have shape \(B, 16, 32\), got \(16, 32\)"),
        (torch.zeros(1, 16, 32, dtype=torch.int64), "z must be floating point, got torch.int64"),
        ("latents", "z must be a torch.Tensor, got str"),
        (torch.full((3, 16, 32), float("nan")), "z must be finite, got NaN or Inf in item 0"),
        (torch.cat([torch.zeros(2, 16, 32), torch.full((1, 16, 32), float("inf"))]), "in item 2"),
    ],
)
def test_bad_latents(tiny, z, message):
    with pytest.raises(InputError, match=message):
        tiny.decode(z)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(1, 3, 60, 64), r"images must have shape \(B, 3, 64, 64\), got \(1, 3, 60, 64\)"),
        (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), "images must be floating point"),
        (torch.full((1, 3, 64, 64), float("nan")), "images must be finite"),
    ],
)
def test_bad_images(tiny, images, message):
    with pytest.raises(InputError, match=message):
        tiny.encode(images)


def test_empty_batch(tiny):
    assert tiny.decode(torch.zeros(0, 16, 32)).shape == (0, 3, 64, 64)
    assert tiny.encode(torch.zeros(0, 3, 64, 64)).shape == (0, 16, 32)


@torch.no_grad()
def test_the_sampler_runs_on_the_compiled_ops(tiny, z):
    """The same decode through the C++ ops: equal to rounding, and decode() itself stays eager."""
    if not extension_status()[0]:
        pytest.skip(f"backend 'cpu': {extension_status()[1]}")
    by_cpu = sample(tiny.decoder, z, tiny.schedule, seed=3, cfg_scale=1.5, steps=2, backend="cpu")
    eager = tiny.decode(z, seed=3, cfg_scale=1.5, steps=2)
    torch.testing.assert_close(by_cpu, eager, rtol=0, atol=1e-5)
