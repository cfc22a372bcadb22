"""One-step decodes as an objective (docs/spec.md#one-step-loss)."""

import math

import pytest
import torch
import torch.nn.functional as F

from msdd_fast import Tokenizer
from msdd_fast.errors import ConfigError
from msdd_fast.sampling import sample
from msdd_fast.training.loop.draws import Draws, Purpose
from msdd_fast.training.recipes.msdd_one_step import OneStepConfig, one_step_loss
from msdd_fast.training.recipes.msdd_stage1 import MSDDTrainConfig, Stage1Config, Stage1Recipe, stage1_loss
from msdd_fast.training.recipes.msdd_unroll import draw_noise, image_pyramid, path_noise
from tests.perturbed import perturbed


def draws(count, seed=0, first=0):
    return Draws(seed, 0, torch.arange(first, first + count))


def photographs(count=4, size=64):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


def difference(x, y):
    return (x - y).abs().mean(dim=(1, 2, 3))


def loss_of(tokenizer, images, config, numbers, perceptual=None):
    z = tokenizer.encoder(images)
    return one_step_loss(tokenizer.decoder, tokenizer.schedule, images, z, config, numbers, perceptual)


@pytest.mark.parametrize(("name", "distance"), [("l2", F.mse_loss), ("l1", F.l1_loss)])
def test_it_is_the_distance_of_what_a_decode_gives(name, distance):
    tokenizer, images = perturbed(), photographs()
    numbers = draws(4, seed=3)

    noise = draw_noise(tokenizer.schedule, 64, numbers.seeds(Purpose.NOISE))
    with torch.no_grad():
        states = sample(
            tokenizer.decoder, tokenizer.encode(images), tokenizer.schedule, noise=noise, return_stages=True
        )
        config = OneStepConfig(share=1.0, image_loss=name, coarse_weight=0.5)
        loss, metrics = loss_of(tokenizer, images, config, numbers)
    assert metrics[f"image_{name}"].mean().item() == pytest.approx(distance(states[-1], images).item(), rel=1e-5)
    ends = [s.end_t for s in tokenizer.schedule.stages]
    clean = [
        (state - end * path_noise(tokenizer.schedule, noise, i)) / (1 - end)
        for i, (end, state) in enumerate(zip(ends, states, strict=True))
    ]
    pyramid = image_pyramid(images, 4)[1:]
    coarse = [distance(a, b).item() for a, b in zip(clean[:-1], pyramid[:-1], strict=True)]
    assert metrics[f"coarse_{name}"].mean().item() == pytest.approx(sum(coarse) / 3, rel=1e-5)
    assert metrics[f"image_{name}"].shape == (4,)
    total = metrics[f"image_{name}"] + 0.5 * metrics[f"coarse_{name}"]
    assert loss.item() == pytest.approx(total.mean().item(), rel=1e-6)


def test_perceptual_term():
    tokenizer, images = perturbed(), photographs()
    plain = loss_of(tokenizer, images, OneStepConfig(share=1.0), draws(4)).value
    config = OneStepConfig(share=1.0, perceptual_weight=0.1, perceptual_crop=32)
    seen = []

    def distance(x, y):
        seen.append((x.shape, y.shape))
        return difference(x, y)

    loss, metrics = loss_of(tokenizer, images, config, draws(4), distance)
    assert seen == [((4, 3, 32, 32), (4, 3, 32, 32))]
    assert (loss - plain).item() == pytest.approx(0.1 * metrics["perceptual"].mean().item(), rel=1e-3)
    with pytest.raises(ConfigError, match="perceptual_weight > 0 needs a perceptual distance"):
        Stage1Recipe(Stage1Config(), None, config)


def test_the_encoder_learns_through_all_scales():
    tokenizer = Tokenizer.from_config("tiny").train()
    loss_of(tokenizer, photographs(), OneStepConfig(share=1.0), draws(4)).value.backward()
    without = [n for n, p in tokenizer.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert without == ["decoder.context_null"]


@pytest.mark.parametrize("share", [0.0, 0.25, 0.7, 1.0])
def test_chosen_images_are_spread_evenly_and_stay_chosen(share):
    config = OneStepConfig(share=share)
    whole = config.chosen(torch.arange(1000))
    assert whole.sum() == math.floor(1000 * share)
    assert torch.equal(whole, torch.cat([config.chosen(torch.arange(i, i + 8)) for i in range(0, 1000, 8)]))
    counts = whole.unfold(0, 20, 1).sum(1)
    assert counts.max() - counts.min() <= 1


def test_no_share_is_stage_1_itself():
    tokenizer, images = perturbed(), photographs(8)
    loss, metrics = Stage1Recipe(Stage1Config()).loss(tokenizer, images, draws(8))
    expected, parts = stage1_loss(tokenizer, images, Stage1Config(), draws(8))
    assert torch.equal(loss, expected) and metrics.keys() == parts.keys()


def test_both_kinds_of_image_in_one_batch():
    tokenizer, images = perturbed(), photographs(8)
    one_step = OneStepConfig(share=0.75)
    recipe = Stage1Recipe(Stage1Config(), None, one_step)
    loss, metrics = recipe.loss(tokenizer, images, draws(8))
    mask = one_step.chosen(torch.arange(8))
    z = tokenizer.encoder(images)
    flow = stage1_loss(tokenizer, images[~mask], Stage1Config(), draws(8).of(~mask), None, z[~mask]).value
    decoded = loss_of(tokenizer, images[mask], one_step, draws(8).of(mask)).value
    assert loss.item() == pytest.approx((0.25 * flow + 0.75 * decoded).item(), rel=1e-5)
    assert {"image_l2", "coarse_l2", "mse/64"} <= metrics.keys()


def test_any_part_of_a_batch_has_the_same_metrics():
    """Processes add their metrics up by name."""
    tokenizer, images = perturbed(), photographs(1)
    recipe = Stage1Recipe(Stage1Config(), difference, OneStepConfig(share=0.5, perceptual_weight=0.1))
    names = [recipe.loss(tokenizer, images, draws(1, first=i)).metrics.keys() for i in (0, 1)]
    assert names[0] == names[1] and "perceptual" in names[0]
    values = [recipe.loss(tokenizer, images, draws(1, first=i)).metrics["image_l2"].numel() for i in (0, 1)]
    assert sorted(values) == [0, 1]


@pytest.mark.parametrize("first", [0, 1])
def test_any_part_of_a_batch_gives_every_parameter_a_gradient(first):
    """DistributedDataParallel waits for those of all processes. The part is one image: of the flow, or decoded."""
    tokenizer = perturbed().train()
    recipe = Stage1Recipe(Stage1Config(stages_per_image=4), None, OneStepConfig(share=0.5))
    recipe.loss(tokenizer, photographs(1), draws(1, first=first)).value.backward()
    assert [name for name, p in tokenizer.named_parameters() if p.grad is None] == []


def test_it_learns():
    """Fifteen steps on two images, from random weights."""
    torch.manual_seed(0)
    tokenizer = Tokenizer.from_config("tiny").train()
    images = F.interpolate(photographs(2, 4), size=64, mode="bilinear")
    optimizer = torch.optim.AdamW(tokenizer.parameters(), lr=1e-3)
    losses = []
    for _ in range(15):
        loss = loss_of(tokenizer, images, OneStepConfig(share=1.0), draws(2)).value
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0], losses


def test_config(tmp_path):
    for bad in (
        {"share": 1.5},
        {"share": -0.1},
        {"coarse_weight": -1},
        {"perceptual_crop": 0},
        {"image_loss": "huber"},
    ):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            OneStepConfig(**bad)
    for share in (0.5, 1.0):
        config = MSDDTrainConfig(data=(), out=str(tmp_path), preset="tiny", one_step=OneStepConfig(share=share))
        assert config.build().tokenizer.decoder.context_null.requires_grad == (share < 1)
