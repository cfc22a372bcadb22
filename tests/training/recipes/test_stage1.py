"""The stage-1 objective (docs/spec.md#stage1-loss)."""

import pytest
import torch

from msdd_fast import Tokenizer
from msdd_fast.diffusion.schedule import build_stages
from msdd_fast.errors import ConfigError
from msdd_fast.training.loop.draws import Draws
from msdd_fast.training.recipes.msdd_stage1 import (
    Stage1Config,
    Stage1Recipe,
    assign_stages,
    image_pyramid,
    sample_times,
    stage1_loss,
    stage_endpoints,
    time_weight,
)
from tests.draws import generator


def draws(count, seed=0, first=0):
    return Draws(seed, 0, torch.arange(first, first + count))


def test_stage_endpoints_by_hand():
    """One noise for both ends; the start is the blurred image at level start_t, the end the sharp one at end_t."""
    stage = build_stages(4)[1]
    images, noise = torch.rand(2, 3, 64, 64), torch.randn(2, 3, 16, 16)
    pyramid = image_pyramid(images, 4)
    assert [p.shape[-1] for p in pyramid] == [4, 8, 16, 32, 64]
    start, end = stage_endpoints(pyramid[1], pyramid[2], stage, noise)
    fine = images.view(2, 3, 16, 4, 16, 4).mean(dim=(3, 5))
    coarse = images.view(2, 3, 8, 8, 8, 8).mean(dim=(3, 5)).repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(end, 0.5 * fine + 0.5 * noise)
    torch.testing.assert_close(start, (1 / 7) * coarse + (6 / 7) * noise)


def test_time_weight_values():
    """The table of docs/spec.md#stage1-loss, and no NaN at the ends."""
    t = torch.tensor([0.999, 0.9, 0.7, 0.5, 0.3, 0.1, 0.01, 0.001])
    expected = torch.tensor([0.0010, 0.110, 0.187, 0.190, 0.235, 0.553, 5.03, 49.8])
    torch.testing.assert_close(time_weight(t), expected, rtol=0.01, atol=6e-4)
    assert time_weight(torch.tensor([0.0, 1.0])).isfinite().all()


def test_times():
    for distribution, spread in (("uniform", 12**-0.5), ("lognormal", 0.208)):
        t = sample_times(draws(20000), Stage1Config(time_distribution=distribution))
        assert t.min() > 0 and t.max() <= 1
        assert torch.allclose(t * 1000, (t * 1000).round(), atol=1e-3)
        assert t.mean() == pytest.approx(0.5, abs=0.01) and t.std() == pytest.approx(spread, abs=0.01)
    t = sample_times(draws(20000), Stage1Config(start_fraction=0.3))
    assert (t == 1).float().mean() == pytest.approx(0.3, abs=0.02)


@pytest.mark.parametrize(("batch", "per_image"), [(8, 1), (8, 2), (10, 1), (5, 4)])
def test_stages_are_balanced_and_distinct(batch, per_image):
    labels = assign_stages(draws(batch), 4, per_image)
    assert labels.shape == (per_image, batch)
    counts = labels.flatten().bincount(minlength=4)
    assert counts.max() - counts.min() <= per_image
    assert all(len(set(column.tolist())) == per_image for column in labels.T)


class Perfect(torch.nn.Module):
    """Answers with a recorded velocity, so that the loss must vanish."""

    def __init__(self, shift):
        super().__init__()
        self.shift, self.calls = shift, []

    def forward(self, x_t, t, z, null_mask):
        self.calls.append((x_t, t, z, null_mask))
        return torch.full_like(x_t, self.shift)


def test_loss_is_the_mean_squared_velocity_error():
    """Constant images: v = (start_t - end_t)(noise - c); a zero answer costs the mean of v squared."""
    tok = Tokenizer.from_config("tiny")
    tok.decoder = Perfect(0.0)
    images = torch.full((64, 3, 64, 64), 0.25)
    loss, metrics = stage1_loss(tok, images, Stage1Config(), draws(64))
    expected = [(s.start_t - s.end_t) ** 2 * (1 + 0.25**2) for s in tok.schedule.stages]
    actual = [metrics[f"mse/{r}"].mean().item() for r in (8, 16, 32, 64)]
    assert actual == pytest.approx(expected, rel=0.05)
    assert loss.item() == pytest.approx(sum(actual) / 4, rel=1e-5)
    for call, stage in zip(tok.decoder.calls, tok.schedule.stages, strict=True):
        assert call[0].shape[0] == 16 and call[2].shape == (16, 16, 32)
        assert ((call[1] <= stage.timestep_max / 1000) & (call[1] >= stage.timestep_min / 1000)).all()


def test_context_dropout_share():
    tok = Tokenizer.from_config("tiny")
    tok.decoder = Perfect(0.0)
    stage1_loss(tok, torch.zeros(400, 3, 64, 64), Stage1Config(context_dropout=0.25), draws(400))
    masks = torch.cat([c[3] for c in tok.decoder.calls])
    assert masks.float().mean() == pytest.approx(0.25, abs=0.07)


def test_reproducible_and_trains_everything():
    tok = Tokenizer.from_config("tiny").train()
    images = torch.rand(8, 3, 64, 64, generator=generator()) * 2 - 1
    config = Stage1Config(stages_per_image=2, start_fraction=0.2, sigmoid_weighting=True, context_dropout=0.5)
    losses = [stage1_loss(tok, images, config, draws(8, 5))[0] for _ in range(2)]
    assert torch.equal(*losses)
    losses[0].backward()
    without = [n for n, p in tok.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert without == []


def test_perceptual_term_is_on_the_last_stage_only():
    tok = Tokenizer.from_config("tiny")
    seen = []

    def distance(x, y):
        seen.append(x.shape)
        return (x - y).abs().mean(dim=(1, 2, 3))

    images = torch.rand(8, 3, 64, 64, generator=generator())
    plain, *_ = stage1_loss(tok, images, Stage1Config(), draws(8, 1))
    weighted, metrics = stage1_loss(tok, images, Stage1Config(perceptual_weight=0.1), draws(8, 1), distance)
    assert seen == [(2, 3, 64, 64)]
    assert (weighted - plain).item() == pytest.approx(0.1 * metrics["perceptual"].mean().item() * 2 / 8, rel=1e-4)
    with pytest.raises(ConfigError, match="perceptual_weight > 0 needs a perceptual distance"):
        Stage1Recipe(Stage1Config(perceptual_weight=0.1))
