"""The stage-2 objective: the student's unroll, the teacher's restart, both recipes, and who learns from what."""

import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F

from msdd_fast import Tokenizer
from msdd_fast.diffusion.config import ScheduleConfig
from msdd_fast.diffusion.schedule import StageSchedule
from msdd_fast.errors import CheckpointError, ConfigError, InputError
from msdd_fast.sampling import sample
from msdd_fast.training.data import ImageDataset, find_images
from msdd_fast.training.loop.config import AdamConfig, LoopConfig, OptimConfig
from msdd_fast.training.loop.draws import Draws, Purpose
from msdd_fast.training.loop.objective import Critic
from msdd_fast.training.loop.trainer import Trainer
from msdd_fast.training.losses.dino import random_features
from msdd_fast.training.losses.discriminator import Discriminator
from msdd_fast.training.losses.perceptual import make_perceptual
from msdd_fast.training.recipes.msdd_stage2 import Stage2Config, Stage2Recipe, make_student, teacher_states
from msdd_fast.training.recipes.msdd_unroll import draw_noise, path_noise, stage_of, unroll
from tests.draws import generator

MATCHING = Stage2Config(recipe="teacher-matching", teacher_steps=2)


def draws(count=2, seed=0, step=0):
    return Draws(seed, step, torch.arange(count))


@pytest.fixture(scope="module")
def teacher():
    torch.manual_seed(0)
    return Tokenizer.from_config("tiny")


@pytest.fixture(scope="module")
def batch():
    return torch.rand(2, 3, 64, 64, generator=generator()) * 2 - 1


def recipe(config, teacher):
    discriminator = None if config.matches_teacher else Discriminator(random_features())
    return Stage2Recipe(config, teacher, make_perceptual("random"), discriminator)


# --- decoding with gradients


@pytest.mark.parametrize(("steps", "cfg_scale"), [(1, 1.0), (3, 1.5)])
def test_unroll_is_the_sampler(teacher, steps, cfg_scale):
    noise, z = draw_noise(teacher.schedule, 64, torch.arange(2)), torch.randn(2, 16, 32, generator=generator())
    mine = unroll(teacher.decoder, noise[0], z, teacher.schedule, noise, 0, steps, cfg_scale)
    theirs = sample(
        teacher.decoder, z, teacher.schedule, steps=steps, cfg_scale=cfg_scale, noise=noise, return_stages=True
    )
    for a, b in zip(mine, theirs, strict=True):
        assert torch.equal(a, b)
    later = unroll(teacher.decoder, mine[2] * 0, z, teacher.schedule, noise, 2, steps, cfg_scale)
    assert [s.shape[-1] for s in later] == [32, 64]


def test_gradients_reach_every_stage(teacher, batch):
    """The loss of the final image alone moves the velocity of all four stages, and the decoder only."""
    student = make_student(teacher)
    velocities = []

    def keep(module, args, velocity):
        velocity.retain_grad()
        velocities.append(velocity)

    student.decoder.register_forward_hook(keep)
    config = Stage2Config(recipe="teacher-matching", reconstruction_weight=0, perceptual_weight=0, image_weight=1)
    loss, metrics = recipe(config, teacher).loss(student, batch, draws())
    loss.backward()
    assert set(metrics) == {"image_mse"}
    assert [v.shape[-1] for v in velocities] == [8, 16, 32, 64]
    assert all(float(v.grad.norm()) > 1e-6 for v in velocities)
    assert all(p.grad is not None for n, p in student.decoder.named_parameters() if n != "context_null")
    assert all(p.grad is None for p in student.encoder.parameters())
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())


# --- where the teacher starts


@pytest.mark.parametrize("stages", [3, 4])
def test_path_noise_is_what_the_sampler_carries(stages):
    """A decode of a flat picture whose network is perfect: every stage starts at its level with this noise."""
    schedule = StageSchedule(ScheduleConfig(num_stages=stages))
    noise = draw_noise(schedule, 64, torch.arange(1))
    flat = 0.3
    x = noise[0]
    for stage in schedule.stages:
        if stage.index:
            x = stage.alpha * F.interpolate(x, scale_factor=2.0) + stage.beta * noise[stage.index]
        n = path_noise(schedule, noise, stage.index)
        torch.testing.assert_close(x, (1 - stage.start_t) * flat + stage.start_t * n, rtol=0, atol=1e-5)
        x = (1 - stage.end_t) * flat + stage.end_t * n


def test_path_noise_is_white():
    schedule = StageSchedule(ScheduleConfig())
    noise = draw_noise(schedule, 64, torch.arange(16))
    for s in range(4):
        n = path_noise(schedule, noise, s)
        assert float(n.std()) == pytest.approx(1, abs=0.04)
        blocks = n.view(16, 3, n.shape[-1] // 2, 2, -1, 2)
        assert float((blocks[..., 0, :, 0] * blocks[..., 1, :, 1]).mean()) == pytest.approx(0, abs=0.05)


def test_stage_of():
    schedule = StageSchedule(ScheduleConfig())
    # T_max 1000, 825, 574, 281: a bound belongs to the later stage.
    expected = {0.999: 0, 0.826: 0, 0.825: 1, 0.575: 1, 0.574: 2, 0.3: 2, 0.281: 3, 0.1: 3, 0.0: 3}
    assert {u: stage_of(schedule, u) for u in expected} == expected


class Recorder(torch.nn.Module):
    """A decoder without velocity that keeps what it saw."""

    def __init__(self, config):
        super().__init__()
        self.config, self.seen = config, []

    def forward(self, x, t, z):
        self.seen.append((x, float(t[0])))
        return torch.zeros_like(x)


@pytest.mark.parametrize("restart", ["schedule", "authors"])
def test_restart(teacher, restart):
    """The first state that the teacher sees, by hand, in every stage."""
    spy = Tokenizer.from_config("tiny")
    spy.decoder = Recorder(spy.config)
    noise = draw_noise(spy.schedule, 64, torch.arange(2))
    image = torch.full((2, 3, 64, 64), 0.4)
    z, starts = torch.zeros(2, 16, 32), set()
    for seed in range(12):
        spy.decoder.seen.clear()
        start, u, states = teacher_states(spy, image, z, noise, Stage2Config(restart=restart), draws(seed=seed))
        starts.add(start)
        stage = spy.schedule[start]
        x, t = spy.decoder.seen[0]
        assert len(spy.decoder.seen) == len(states) == 4 - start
        assert start == stage_of(spy.schedule, u) and t == pytest.approx(stage.timestep_max / 1000)
        assert x.shape[-1] == spy.config.stage_resolution(start)
        level = u if restart == "authors" else stage.start_t
        carried = (x - (1 - level) * 0.4) / level
        assert float(carried.std()) == pytest.approx(1, abs=0.15)
        own = torch.allclose(carried, path_noise(spy.schedule, noise, start), atol=1e-4)
        assert own == (restart == "schedule")
    assert starts == {0, 1, 2, 3}


def test_teacher_matching_uses_the_students_noise(teacher):
    noise, z = draw_noise(teacher.schedule, 64, torch.arange(2)), torch.randn(2, 16, 32, generator=generator())
    image = torch.zeros(2, 3, 64, 64)
    start, _, states = teacher_states(teacher, image, z, noise, MATCHING, draws())
    assert start == 0
    torch.testing.assert_close(states[-1], sample(teacher.decoder, z, teacher.schedule, steps=2, noise=noise))


# --- the objective


def test_a_student_that_equals_its_teacher_has_nothing_to_match(teacher, batch):
    config = Stage2Config(recipe="teacher-matching", teacher_steps=1)
    loss, metrics = recipe(config, teacher).loss(make_student(teacher), batch, draws())
    assert float(loss.detach()) < 1e-9 and all(float(v) < 1e-9 for v in metrics.values())
    loss, *_ = recipe(MATCHING, teacher).loss(make_student(teacher), batch, draws())
    assert float(loss.detach()) > 1e-4


def test_losses_add_up(teacher, batch):
    config = Stage2Config(reconstruction_weight=0.7, image_weight=0.3, perceptual_weight=0.2, adaptive=False)
    loss, f = recipe(config, teacher).loss(make_student(teacher), batch, draws())
    u = float(torch.rand((), generator=draws().shared(Purpose.RESTART_LEVEL)))
    rest = 0.3 * f["image_mse"] + 0.2 * f["random_distance"]
    expected = 2.5 * (0.7 * f["reconstruction"] / (1 + u) + rest) + f["random-vit/generator"]
    assert float(loss.detach()) == pytest.approx(float(expected), rel=1e-5)
    assert float(f["random-vit/weight"]) == 1


@pytest.mark.parametrize("config", [Stage2Config(adversarial_loss="log"), MATCHING], ids=lambda c: c.recipe)
def test_bfloat16(teacher, batch, config):
    """Under autocast the loss stays near that of float32, and every gradient is finite."""
    student, made = make_student(teacher), recipe(config, teacher)
    expected = made.loss(student, batch, draws()).metrics
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, metrics = made.loss(student, batch, draws())
    loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in student.parameters())
    for name in ("reconstruction", "random_distance"):
        assert float(metrics[name]) == pytest.approx(float(expected[name]), rel=0.1, abs=1e-3)


def test_perceptual_target_and_crop(teacher, batch):
    def distance(**kwargs):
        config = dataclasses.replace(MATCHING, **kwargs)
        return float(recipe(config, teacher).loss(make_student(teacher), batch, draws()).metrics["random_distance"])

    assert distance() == distance(perceptual_target="teacher") != distance(perceptual_target="image")
    cropped = distance(perceptual_target="image", perceptual_crop=32)
    assert cropped != distance(perceptual_target="image") and cropped == pytest.approx(
        distance(perceptual_target="image"), rel=0.5
    )


def test_context_dropout_gives_the_null_context(teacher, batch):
    student, seen = make_student(teacher), []
    student.decoder.register_forward_pre_hook(lambda _, args: seen.append(args[2]))
    dropped = dataclasses.replace(MATCHING, context_dropout=0.999)
    recipe(dropped, teacher).loss(student, batch, draws())
    assert all(torch.equal(z, student.decoder.context_null.expand(2, -1, -1)) for z in seen)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(teacher_steps=0), InputError, "steps must be an integer >= 1, got 0"),
        (dict(perceptual_weight=-1.0), ConfigError, "perceptual_weight must be at least 0, got -1.0"),
        (dict(context_dropout=1.0), ConfigError, r"context_dropout must be in \[0, 1\), got 1.0"),
        (dict(perceptual_crop=0), ConfigError, "perceptual_crop must be at least 1, got 0"),
        (dict(perceptual_target="teacher"), ConfigError, "needs recipe 'teacher-matching', got 'adversarial'"),
        (dict(recipe="teacher-matching", reconstruction_weight=0), ConfigError, "no teacher is run"),
        (dict(reconstruction_weight=0, perceptual_weight=0), ConfigError, "must be above 0"),
    ],
)
def test_impossible_objectives(arguments, error, message):
    with pytest.raises(error, match=message):
        Stage2Config(**arguments)


def test_missing_networks(teacher):
    with pytest.raises(ConfigError, match="perceptual_weight > 0 needs a perceptual distance"):
        Stage2Recipe(MATCHING, teacher)
    with pytest.raises(ConfigError, match="recipe 'adversarial' needs a discriminator"):
        Stage2Recipe(Stage2Config(), teacher, make_perceptual("random"))


# --- teacher and student


def test_the_student_is_set_to_one_step(teacher):
    student = make_student(teacher)
    assert student.config.sampling.steps == 1 and student.config.sampling.cfg_scale == 1
    assert all(p.requires_grad for p in student.decoder.parameters())
    assert not any(p.requires_grad for p in student.encoder.parameters())


def test_a_student_with_another_decoder(teacher, tmp_path):
    config = dataclasses.replace(teacher.config, decoder=dataclasses.replace(teacher.config.decoder, depth=1))
    small = Tokenizer.from_config(config)
    small.encoder.load_state_dict(teacher.encoder.state_dict())
    small.save_pretrained(tmp_path / "small")
    assert len(make_student(teacher, str(tmp_path / "small")).decoder.blocks) == 1


def test_teacher_and_student_that_do_not_match(teacher, tmp_path):
    Tokenizer.from_config("tiny").save_pretrained(tmp_path / "foreign")
    with pytest.raises(ConfigError, match=r"student must have the teacher's encoder, got other weights in encoder\."):
        make_student(teacher, str(tmp_path / "foreign"))
    schedule = ScheduleConfig(num_stages=3)
    Tokenizer.from_config(dataclasses.replace(teacher.config, schedule=schedule)).save_pretrained(tmp_path / "three")
    with pytest.raises(ConfigError, match=r"student must have the teacher's schedule, .*num_stages=4.* got .*=3"):
        make_student(teacher, str(tmp_path / "three"))


# --- two networks in one loop


def trainer(images, teacher, out, steps, adversarial=True, **loop):
    torch.manual_seed(0)
    config = Stage2Config(consistency_weight=0.1) if adversarial else MATCHING
    made = recipe(config, teacher)
    critic = AdamConfig(lr=1e-3, warmup_steps=2, min_lr_ratio=0.5)
    loop = {"batch_size": 2, "precision": "float32", "device": "cpu", "workers": 0, "log_every": 1, **loop}
    return Trainer(
        make_student(teacher),
        ImageDataset(find_images([images]), 64, seed=0),
        made,
        out,
        OptimConfig(lr=2e-3, warmup_steps=1, ema_decay=0.5),
        LoopConfig(steps=steps, **loop),
        critic=Critic(made.discriminator, made.critic_loss, critic) if adversarial else None,
    )


def test_the_discriminator_really_steps(images, teacher, tmp_path):
    """Every head moves, on a schedule of its own; the student's optimiser has none of it, nor the other way round."""
    run = trainer(images, teacher, tmp_path, 4)
    heads = [p.detach().clone() for p in run.critic.module.parameters()]
    features = [p.clone() for p in run.critic.module._features[0].parameters()]
    ids = {id(p) for o in run.optimizers for g in o.param_groups for p in g["params"]}
    assert ids == {id(p) for p in run.tokenizer.decoder.parameters()}
    run.run()
    changed = [not torch.equal(a, b) for a, b in zip(heads, run.critic.module.parameters(), strict=True)]
    # A bias in front of a normalisation has no effect; AdamW moves it all the same, by rounding errors.
    assert len(changed) == 5 * 10 and all(changed)
    assert all(torch.equal(a, b) for a, b in zip(features, run.critic.module._features[0].parameters(), strict=True))
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["critic_lr"] for line in log] == pytest.approx([5e-4, 1e-3, 1e-3, 7.5e-4])
    assert all(line["critic_grad_norm"] > 0 for line in log)
    assert {"random-vit/discriminator", "random-vit/consistency", "random_distance", "reconstruction"} <= set(log[0])


@pytest.mark.parametrize("adversarial", [True, False])
def test_resume_is_exact(images, teacher, tmp_path, adversarial):
    whole = trainer(images, teacher, tmp_path / "whole", 4, adversarial)
    whole.run()
    part = trainer(images, teacher, tmp_path / "part", 4, adversarial)
    batches = part.batches()
    for _ in range(2):
        part.train_step(next(batches))
    part.save_state()
    resumed = trainer(images, teacher, tmp_path / "part", 4, adversarial)
    assert resumed.step == 2
    for a, b in zip(whole.ema.model.parameters(), resumed.run().parameters(), strict=True):
        assert torch.equal(a, b)
    if adversarial:
        states = (t.critic.module.state_dict() for t in (whole, resumed))
        for a, b in zip(*(s.values() for s in states), strict=True):
            assert torch.equal(a, b)
    with pytest.raises(CheckpointError, match="its discriminator is not this run's; choose another out folder"):
        trainer(images, teacher, tmp_path / "part", 4, not adversarial)


def test_preview(teacher, batch):
    """Teacher and student; the teacher decodes once for the same images."""
    made, student = recipe(MATCHING, teacher), make_student(teacher)
    by_teacher, by_student = made.preview(student, batch)
    z = teacher.encode(batch)
    assert torch.equal(by_teacher, teacher.decode(z, steps=2)) and torch.equal(by_student, student.decode(z))
    assert made.preview(student, batch)[0] is by_teacher and made.preview(student, batch.clone())[0] is not by_teacher
