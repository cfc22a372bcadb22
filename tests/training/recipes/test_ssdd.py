"""SSDD's recipes on the one trainer: what the losses are, what is shared, and that twenty steps of each teach."""

import json
import shutil

import pytest
import torch
import torch.nn.functional as F

from msdd_fast import Tokenizer
from msdd_fast.commands.main import main
from msdd_fast.errors import ConfigError
from msdd_fast.training.data import ImageDataset, find_images
from msdd_fast.training.loop.config import AdamConfig, LoopConfig, OptimConfig
from msdd_fast.training.loop.draws import Draws, Purpose
from msdd_fast.training.loop.optimizers import build_optimizers
from msdd_fast.training.loop.trainer import Trainer
from msdd_fast.training.losses.perceptual import make_perceptual
from msdd_fast.training.recipes.ssdd_alignment import Alignment
from msdd_fast.training.recipes.ssdd_distill import SSDDDistillation, one_step_student
from msdd_fast.training.recipes.ssdd_flow import SSDDRecipe, trainable
from msdd_fast.training.recipes.ssdd_objective import SSDDObjective, draw_noise
from tests.draws import generator
from tests.families.ssdd.test_ssdd import random_tokenizer
from tests.training.launch import curve, spawn

PLAIN = SSDDObjective(perceptual_weight=0.0)


def draws(count=2, seed=0):
    return Draws(seed, 0, torch.arange(count))


@pytest.fixture
def batch():
    return torch.rand(2, 3, 32, 32, generator=generator()) * 2 - 1


class Patches:
    """A backbone for tests: the mean colours of the patches, mixed."""

    patch_size, width = 14, 6

    def __init__(self):
        self.mix = torch.randn(3, self.width, generator=generator(7))
        self.seen = []

    def __call__(self, images):
        self.seen.append(images)
        return F.avg_pool2d(images, self.patch_size).flatten(2).transpose(1, 2) @ self.mix


def spied(tok, monkeypatch):
    """Every call of any decoder: (decoder, x_t, t, z)."""
    calls, inner = [], type(tok.decoder).forward

    def forward(self, x_t, t, z):
        calls.append((self, x_t.detach().clone(), t.clone(), z.detach().clone()))
        return inner(self, x_t, t, z)

    monkeypatch.setattr(type(tok.decoder), "forward", forward)
    return calls


# --- flow matching


def test_flow_matching_by_hand(batch, monkeypatch):
    """x_t on the line from image to noise, t and z as drawn, the velocity's error; KL of the sampled posterior."""
    tok = random_tokenizer()
    calls = spied(tok, monkeypatch)
    loss, metrics = SSDDRecipe(SSDDObjective(perceptual_weight=0.0, kl_weight=0.01)).loss(tok, batch, draws(seed=1))
    ((_, x_t, t, z),) = calls
    posterior = tok.encoder.posterior(batch)
    drawn = draw_noise(posterior.mean, draws(seed=1), Purpose.LATENT_NOISE)
    assert drawn.std() == pytest.approx(1.0, abs=0.15)
    torch.testing.assert_close(z, posterior.sample(drawn))
    tt = t[:, None, None, None]
    noise = (x_t - (1 - tt) * batch) / tt
    assert noise.std() == pytest.approx(1.0, abs=0.05)
    v = tok.decoder(x_t, t, z)
    mse = (v - (noise - batch)).square().mean()
    assert metrics["mse"].item() == pytest.approx(mse.item(), rel=1e-4)
    kl = posterior.kl().mean()
    assert metrics["kl"].item() == pytest.approx(kl.item(), rel=1e-4)
    assert loss.item() == pytest.approx((mse + 0.01 * kl).item(), rel=1e-4)


def test_times_are_logit_normal(monkeypatch):
    tok = random_tokenizer()
    monkeypatch.setattr(type(tok.decoder), "forward", lambda self, x_t, t, z: times.append(t) or x_t)
    times = []
    SSDDRecipe(PLAIN).loss(tok, torch.zeros(500, 3, 8, 8), draws(500))
    t = times[0]
    assert t.mean() == pytest.approx(0.5, abs=0.04) and t.std() == pytest.approx(0.208, abs=0.02)


def test_perceptual_term_is_of_the_clean_estimate(batch, monkeypatch):
    tok = random_tokenizer()
    distance = make_perceptual("random")
    calls = spied(tok, monkeypatch)
    loss, metrics = SSDDRecipe(SSDDObjective(kl_weight=0.0), perceptual=distance).loss(tok, batch, draws())
    _, x_t, t, z = calls[0]
    x0 = x_t - t[:, None, None, None] * tok.decoder(x_t, t, z)
    expected = distance(x0, batch).mean()
    assert metrics["random_distance"].item() == pytest.approx(expected.item(), rel=1e-4)
    assert loss.item() == pytest.approx((metrics["mse"] + 0.5 * expected).item(), rel=1e-5)


def test_who_learns(batch):
    """Everything; or all but the encoder, whose latents are sampled all the same."""
    for train_encoder in (True, False):
        objective = SSDDObjective(perceptual_weight=0.0, train_encoder=train_encoder)
        tok = trainable(random_tokenizer(), objective)
        loss, metrics = SSDDRecipe(objective).loss(tok, batch, draws())
        loss.backward()
        without = {n.split(".")[0] for n, p in tok.named_parameters() if p.grad is None}
        assert without == (set() if train_encoder else {"encoder"})
        assert ("kl" in metrics) == train_encoder
        assert all(p.grad.isfinite().all() for p in tok.parameters() if p.grad is not None)


# --- distillation


def test_student_and_teacher_share_latents_and_noise(batch, monkeypatch):
    teacher = random_tokenizer()
    student = one_step_student(random_tokenizer(seed=1))
    recipe = SSDDDistillation(PLAIN, teacher)
    calls = spied(teacher, monkeypatch)
    loss, metrics = recipe.loss(student, batch, draws())
    assert [c[0] is teacher.decoder for c in calls] == [True] * 7 + [False]
    (_, x_teacher, t_teacher, z_teacher), (_, x_student, t_student, z_student) = calls[0], calls[-1]
    assert torch.equal(x_teacher, x_student) and torch.equal(z_teacher, z_student)
    assert torch.equal(t_teacher, torch.ones(2)) and torch.equal(t_student, torch.ones(2))
    torch.testing.assert_close(z_student, teacher.encode(batch))  # the mode
    assert x_student.std() == pytest.approx(1.0, abs=0.05)
    target = teacher.decode(z_student, steps=7, noise=[x_student])
    mine = student.decode(z_student, noise=[x_student])
    expected = (target - mine).square().mean()
    assert loss.item() == metrics["mse"].item() == pytest.approx(expected.item(), rel=1e-4)
    loss.backward()
    assert all(p.grad is None for p in (*teacher.parameters(), *student.encoder.parameters()))
    assert all(p.grad is not None for p in student.decoder.parameters())


def test_a_student_like_its_one_step_teacher_has_nothing_to_learn(batch):
    teacher = random_tokenizer()
    objective = SSDDObjective(teacher_steps=1)
    recipe = SSDDDistillation(objective, teacher, perceptual=make_perceptual("random"))
    loss, metrics = recipe.loss(one_step_student(teacher), batch, draws())
    assert set(metrics) == {"mse", "random_distance"} and loss.item() < 1e-8


def test_student_is_a_copy_set_to_one_step():
    teacher = random_tokenizer()
    student = one_step_student(teacher)
    assert student.config.sampling.steps == 1 and teacher.config.sampling.steps == 2
    assert {n for n, p in student.named_parameters() if not p.requires_grad} == {
        f"encoder.{n}" for n, _ in student.encoder.named_parameters()
    }


# --- alignment


def test_alignment(batch):
    """Tokens of the middle block against the normalised, resized picture; gradients to decoder and head apart."""
    tok = random_tokenizer()
    backbone = Patches()
    alignment = Alignment(backbone, tok.config)
    assert alignment.layer == 1
    objective = SSDDObjective(perceptual_weight=0.0, alignment_weight=0.25)
    recipe = SSDDRecipe(objective, alignment=alignment)
    made = recipe.loss(tok, batch, draws())
    loss, metrics = made
    assert [tuple(x.shape) for x in backbone.seen] == [(2, 3, 56, 56)]  # 4 x 4 tokens of 14 pixels
    plain, *_ = SSDDRecipe(PLAIN).loss(tok, batch, draws())
    assert (loss - plain).item() == pytest.approx(0.25 * metrics["alignment"].item(), rel=1e-3)
    assert 0 < metrics["alignment"] < 2
    loss.backward()
    assert all(p.grad is None for p in alignment.head.parameters())
    critic_loss, *_ = recipe.critic.loss([made.for_critic])
    assert critic_loss.item() == pytest.approx(metrics["alignment"].item(), rel=1e-5)
    critic_loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in alignment.head.parameters())


def test_backbone_sees_imagenet_normalised_pictures():
    backbone = Patches()
    features = Alignment(backbone, random_tokenizer().config).features(torch.zeros(1, 3, 16, 24))
    assert features.shape == (1, 6, backbone.width)
    expected = [(0.5 - m) / s for m, s in zip((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), strict=True)]
    torch.testing.assert_close(backbone.seen[0].mean(dim=(0, 2, 3)), torch.tensor(expected))


# --- errors


def test_what_is_missing_or_impossible():
    with pytest.raises(ConfigError, match="perceptual_weight > 0 needs a perceptual distance"):
        SSDDRecipe(SSDDObjective())
    with pytest.raises(ConfigError, match="alignment_weight > 0 needs a backbone"):
        SSDDRecipe(SSDDObjective(perceptual_weight=0.0, alignment_weight=0.25))
    with pytest.raises(ConfigError, match="kl_weight must be at least 0, got -1"):
        SSDDObjective(kl_weight=-1.0)
    with pytest.raises(ConfigError, match="teacher_steps must be at least 1, got 0"):
        SSDDObjective(teacher_steps=0)
    with pytest.raises(ConfigError, match="tokenizer must be of the family ssdd, got msdd"):
        SSDDDistillation(PLAIN, Tokenizer.from_config("tiny"))


def test_muon_is_refused():
    with pytest.raises(ConfigError, match="optimizer 'muon' is for matrices of transformer blocks, and there are none"):
        build_optimizers(random_tokenizer(), OptimConfig(optimizer="muon"))


def test_the_programs_know_the_family(images, tmp_path, capsys):
    """Train and distill by an SSDD preset and teacher; a wrong one is declined before anything is written."""
    options = f"--data {images} --objective.perceptual-weight 0 --optim.warmup-steps 1"
    loop = "--loop.steps 2 --loop.batch-size 2 --loop.workers 0 --loop.device cpu --loop.precision float32"
    train = f"train --preset tiny-ssdd --image-size 32 --out {tmp_path}/a {options} {loop}"
    assert main(train.split()) == 0
    teacher = Tokenizer.from_pretrained(tmp_path / "a/checkpoint")
    assert (teacher.config.family, teacher.config.image_size) == ("ssdd", 32)
    assert main(f"distill --teacher {tmp_path}/a/checkpoint --out {tmp_path}/b {options} {loop}".split()) == 0
    assert Tokenizer.from_pretrained(tmp_path / "b/checkpoint").config.sampling.steps == 1
    assert main(["convert", f"{tmp_path}/a/state/00000002", f"{tmp_path}/exported"]) == 0
    assert Tokenizer.from_pretrained(tmp_path / "exported").config == teacher.config
    assert main(f"{train} --loop.steps 3".split()) == 0  # continues from the state
    assert (tmp_path / "a/state/00000003").exists()
    more = f"--config {tmp_path}/a/config.json --start {tmp_path}/a/checkpoint --out {tmp_path}/c"
    assert main(["train", *more.split()]) == 0
    capsys.readouterr()
    wrong = f"train --config {tmp_path}/a/config.json --start msdd-nano --out {tmp_path}/d"
    assert main(wrong.split()) == 1
    assert "start must be of the family ssdd, as the preset 'tiny-ssdd' is, got msdd-nano" in capsys.readouterr().err
    plain = f"train --preset tiny-ssdd --data {images} --out {tmp_path}/d"
    assert main(plain.split()) == 1 and "perceptual 'lpips-vgg' needs the file vgg16" in capsys.readouterr().err
    assert not (tmp_path / "d").exists()


def short_run(images, out, **loop):
    torch.manual_seed(0)
    tok = random_tokenizer()
    alignment = Alignment(Patches(), tok.config, AdamConfig(lr=1e-2, warmup_steps=1))
    recipe = SSDDRecipe(SSDDObjective(perceptual_weight=0.0, alignment_weight=0.25), alignment=alignment)
    run(images, out, tok, recipe, lr=1e-4, batch=2, steps=2, **loop)


def test_resume_is_exact(images, tmp_path):
    """The state of step 1 belongs to the run, although JSON has lists for the config's tuples."""
    short_run(images, tmp_path / "whole")
    short_run(images, tmp_path / "part", checkpoint_every=1)
    shutil.rmtree(tmp_path / "part/state/00000002")
    short_run(images, tmp_path / "part")
    assert curve(tmp_path / "whole") == curve(tmp_path / "part")
    models = [Tokenizer.from_pretrained(tmp_path / name / "checkpoint") for name in ("whole", "part")]
    assert all(torch.equal(p, q) for p, q in zip(*(m.parameters() for m in models), strict=True))


def in_two_processes(images, out):
    short_run(images, out)


def test_processes_micro_batches_and_checkpointing_change_nothing(images, tmp_path):
    """Two processes; and micro-batches with activations calculated again: the curve of one plain batch, to rounding."""
    short_run(images, tmp_path / "one")
    short_run(images, tmp_path / "micro", micro_batch=1, activation_checkpointing=True)
    spawn(in_two_processes, 2, images, tmp_path / "two")
    expected = curve(tmp_path / "one")
    assert len(expected) == 2 and {"mse", "alignment", "kl", "critic_grad_norm"} <= set(expected[0])
    for name in ("micro", "two"):
        for line, other in zip(expected, curve(tmp_path / name), strict=True):
            assert other == pytest.approx(line, rel=1e-3, abs=1e-5), name


# --- twenty steps


def run(images, out, tok, recipe, lr, batch=4, steps=20, preview=None, **more):
    torch.manual_seed(0)
    loop = LoopConfig(steps=steps, batch_size=batch, precision="float32", device="cpu", workers=0, log_every=1, **more)
    optim = OptimConfig(lr=lr, warmup_steps=3, ema_decay=0.9)
    dataset = ImageDataset(find_images([images]), 32, seed=0)
    return Trainer(tok, dataset, recipe, out, optim, loop, critic=recipe.critic, preview=preview).run()


def read(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_twenty_steps_of_training(images, tmp_path):
    torch.manual_seed(0)
    objective = SSDDObjective(alignment_weight=0.25)
    tok = trainable(Tokenizer.from_config("tiny-ssdd"), objective)
    alignment = Alignment(Patches(), tok.config, AdamConfig(lr=1e-2, warmup_steps=1))
    recipe = SSDDRecipe(objective, make_perceptual("random"), alignment)
    trained = run(images, tmp_path, tok, recipe, lr=3e-3, preview=torch.zeros(1, 3, 32, 32))
    log = read(tmp_path)
    assert len(log) == 20 and {"loss", "mse", "random_distance", "alignment", "kl", "grad_norm"} <= set(log[0])
    for name in ("loss", "mse", "alignment"):
        values = [line[name] for line in log]
        assert sum(values[-5:]) < 0.85 * sum(values[:5]), name
    assert all(p.isfinite().all() for p in trained.parameters())
    saved = Tokenizer.from_pretrained(tmp_path / "checkpoint")
    assert saved.config == trained.config
    assert (tmp_path / "samples/000020.png").exists()


def test_twenty_steps_of_distillation(images, tmp_path):
    """The student starts as a teacher whose one step is not its four, and comes closer."""
    teacher = random_tokenizer()
    recipe = SSDDDistillation(SSDDObjective(teacher_steps=4), teacher, make_perceptual("random"))
    preview = torch.zeros(1, 3, 32, 32)
    trained = run(images, tmp_path, one_step_student(teacher), recipe, lr=2e-3, batch=2, preview=preview)
    log = read(tmp_path)
    losses = [line["loss"] for line in log]
    assert len(losses) == 20 and sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert all(p.isfinite().all() for p in trained.parameters())
    assert Tokenizer.from_pretrained(tmp_path / "checkpoint").config.sampling.steps == 1
