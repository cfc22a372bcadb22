"""Networks that predict the noise-free image instead of the velocity (docs/spec.md#image-prediction)."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from msdd_fast import Tokenizer, accelerate
from msdd_fast.diffusion.schedule import build_stages
from msdd_fast.errors import ConfigError, InputError
from msdd_fast.families import get_preset
from msdd_fast.families.msdd.config import TokenizerConfig
from tests.perturbed import perturbed
from tests.reference import reference


def predicting_images(conditioning="cross") -> TokenizerConfig:
    tiny = get_preset("tiny")
    return replace(tiny, decoder=replace(tiny.decoder, conditioning=conditioning, prediction="image"))


def normals(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("stage", build_stages(4), ids=lambda s: f"stage{s.index}")
def test_the_noise_free_point_gives_the_velocity(stage):
    """The image of the specification, put into its formula of v, gives start - end at every time."""
    fine, noise = normals(2, 3, 8, 8), normals(2, 3, 8, 8, seed=1)
    blurred = F.interpolate(F.avg_pool2d(fine, 2), scale_factor=2.0)
    a, e = stage.start_t, stage.end_t
    start, end = (1 - a) * blurred + a * noise, (1 - e) * fine + e * noise
    point = (a * (1 - e) * fine - e * (1 - a) * blurred) / (a - e)
    assert point.mean().item() == pytest.approx(fine.mean().item(), abs=1e-6)
    if stage.index in (0, 3):
        torch.testing.assert_close(point, fine)
    for t in (1.0, 0.6, 0.06):
        x_t = (1 - t) * end + t * start
        gain = stage.velocity_gain(torch.tensor(t))
        torch.testing.assert_close(gain * (x_t - point), start - end, rtol=1e-4, atol=1e-4)


def test_the_gain_is_bounded():
    last = build_stages(4)[-1]
    assert last.velocity_gain(torch.zeros(1)).item() == pytest.approx(last.start_t / 0.02)


def test_within_stage_time():
    for stage in build_stages(4):
        t = torch.tensor([1.0, 0.5, 0.0])
        model_time = (stage.timestep_min + t * (stage.timestep_max - stage.timestep_min)) / 1000
        torch.testing.assert_close(stage.within_stage_time(model_time), t, atol=1e-6, rtol=0)


@torch.no_grad()
def test_decoder():
    """The same weights as image and as velocity."""
    image = perturbed(predicting_images())
    velocity = Tokenizer.from_config("tiny")
    velocity.load_state_dict(image.state_dict())
    z = normals(2, 16, 32)
    for stage in image.schedule.stages:
        x = normals(2, 3, *[image.config.stage_resolution(stage.index)] * 2, seed=stage.index)
        t = torch.tensor([stage.timestep_max, (stage.timestep_max + stage.timestep_min) / 2]) / 1000
        gain = stage.velocity_gain(torch.tensor([1.0, 0.5]))[:, None, None, None]
        torch.testing.assert_close(image.decoder(x, t, z), gain * (x - velocity.decoder(x, t, z)))
    with pytest.raises(InputError, match=r"x_t must have the resolution of a stage, one of \[8, 16, 32, 64\], got 24"):
        image.decoder(torch.zeros(1, 3, 24, 24), torch.ones(1), z[:1])


def test_config_is_kept():
    config = predicting_images()
    assert TokenizerConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ConfigError, match="prediction"):
        TokenizerConfig.from_dict({"decoder": {"prediction": "noise"}})


@pytest.mark.parametrize("cfg_scale", [1.0, 2.0])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("conditioning", ["cross", "joint"])
def test_engine(conditioning, steps, cfg_scale):
    tok, z = perturbed(predicting_images(conditioning)), normals(3, 16, 32)
    expected = reference(tok, z, 7, steps, cfg_scale)
    engine = accelerate(tok, dtype=torch.float32, steps=steps, cfg_scale=cfg_scale)
    assert (engine.decode(z, 7) - expected).abs().max() < 5e-5
    noise = [normals(3, 3, r, r, seed=r) for r in (8, 16, 32, 64)]
    given = reference(tok, z, noise=noise, steps=steps, cfg_scale=cfg_scale)
    assert (engine.decode(z, noise=noise) - given).abs().max() < 5e-5
    previews = []
    tok.decode(z, seed=7, steps=steps, cfg_scale=cfg_scale, stage_callback=lambda r: previews.append(r.clean))
    for stage, preview in zip(engine.stream(z, 7), previews, strict=True):
        assert (stage.images - preview).abs().max() < 2e-4


def test_a_patch_may_have_more_values_than_a_token():
    """The preset at 256 px: an untrained network that gives the zero image leaves no noise in the result."""
    torch.manual_seed(0)
    tok = Tokenizer.from_config("msdd-nano-256")
    assert 3 * tok.config.patch_size**2 > tok.config.decoder.hidden_size
    assert tok.config.num_parameters < 12e6
    assert tok.decode(normals(1, 128, 32)).abs().max() < 1e-5
