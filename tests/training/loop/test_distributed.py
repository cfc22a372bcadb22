"""Several processes, or several micro-batches, give the curve of one."""

import pytest
import torch

from msdd_fast.errors import ConfigError
from tests.training.launch import command, curve, finish, spawn, start, trainer

# What is compared: 1 process, 4 images at a time. AdamW and Muon divide a gradient by its own size, which enlarges the
# rounding of its sum; the first step, before that, agrees far better.
RUNS = [
    ("stage1", "adamw"),
    ("stage1", "muon"),
    ("one-step", "adamw"),
    ("adversarial", "adamw"),
    ("teacher-matching", "adamw"),
]


def name(kind, optimizer, variant):
    return f"{kind}-{optimizer}-{variant}"


def in_two(images, folder):
    for kind, optimizer in RUNS:
        trainer(kind, images, folder / name(kind, optimizer, "two"), optimizer=optimizer, sample_every=100).run()
    trainer("stage1", images, folder / name("stage1", "adamw", "two-by-one"), micro_batch=1).run()


def perturbed(images, folder, seed):
    """The adversarial run from weights that are moved by half a unit in the last place."""
    run = trainer("adversarial", images, folder / f"moved-{seed}")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in run.tokenizer.parameters():
            p.mul_(1 + (torch.rand(p.shape, generator=generator) - 0.5) * 2.0**-23)
    run.run()
    return curve(folder / f"moved-{seed}")


@pytest.fixture(scope="module")
def folder(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")

    def in_one():
        for kind, optimizer in RUNS:
            trainer(kind, images, folder / name(kind, optimizer, "one"), optimizer=optimizer).run()

    spawn(in_two, 2, images, folder, meanwhile=in_one)
    return folder


def assert_same(a, b, rest=1e-3):
    """The first step to float32's rounding; later ones to ``rest``."""
    assert len(a) == len(b) and len(a) > 1
    for i, (x, y) in enumerate(zip(a, b, strict=True)):
        rel, floor = (rest, 1e-4) if i else (1e-5, 2e-6)
        assert y == pytest.approx(x, rel=rel, abs=floor), i


@pytest.mark.parametrize(("kind", "optimizer"), RUNS)
def test_two_processes_give_the_curve_of_one(folder, kind, optimizer):
    one, two = (curve(folder / name(kind, optimizer, variant)) for variant in ("one", "two"))
    if kind == "adversarial":  # its later steps: the next test
        assert two[0] == pytest.approx(one[0], rel=1e-3, abs=1e-5)
        assert [line["loss"] for line in two] == pytest.approx([line["loss"] for line in one], rel=1e-2)
    else:
        assert_same(one, two)
    assert [line["step"] for line in one] == [1, 2, 3, 4]


def test_later_adversarial_steps_differ_by_rounding_alone(images, folder, tmp_path):
    """Two processes move a figure at most four times as far as weights that begin half a unit in the last place away.

    The adversarial weight is a ratio of gradients, one of which nearly cancels in the batch normalisation, so rounding
    may move it by per cents.
    """
    one, two = (curve(folder / name("adversarial", "adamw", variant)) for variant in ("one", "two"))
    moved = [perturbed(images, tmp_path, seed) for seed in range(4)]
    for step, (x, y) in enumerate(zip(one, two, strict=True)):
        for figure, value in x.items():
            drift = max(abs(lines[step][figure] - value) for lines in moved)
            assert y[figure] == pytest.approx(value, rel=1e-3, abs=max(1e-4, 4 * drift)), (step, figure)


def test_processes_and_micro_batches_together(folder):
    assert_same(*(curve(folder / name("stage1", "adamw", variant)) for variant in ("one", "two-by-one")))


@pytest.mark.parametrize("kind", ["stage1", "teacher-matching"])
def test_accumulation(images, tmp_path, kind):
    """Four micro-batches of 4 give the gradients of one batch of 16."""
    gradients, losses = [], []
    for micro in (None, 4):
        run = trainer(kind, images, tmp_path / str(micro), steps=2, batch_size=16, micro_batch=micro)
        batches = run.batches()
        losses.append([run.train_step(next(batches))["loss"]])
        gradients.append([p.grad.clone() for p in run.tokenizer.parameters() if p.grad is not None])
        losses[-1] += [run.train_step(batch)["loss"] for batch in batches]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and len(losses[0]) == 2


def test_a_batch_that_cannot_be_shared(images, tmp_path):
    with pytest.raises(ConfigError, match=r"micro_batch must divide the 4 images of a process .*, got 3"):
        trainer("stage1", images, tmp_path, micro_batch=3)
    results = finish(start(3, command(images, tmp_path / "three")))
    assert all(status == 1 for status, _ in results)
    message = "msdd-fast: error: batch_size must be a multiple of the number of processes, 3, got 4"
    assert [err.count("error: ") for _, err in results] == [1, 0, 0] and message in results[0][1]


@pytest.mark.parametrize("option", ["activation_checkpointing", pytest.param("compile", marks=pytest.mark.slow)])
def test_checkpointed_and_compiled_blocks_give_the_same_gradients(images, tmp_path, option):
    gradients = []
    for value in (False, True):
        kind = "stage1" if option == "compile" else "adversarial"  # fewer shapes to compile
        run = trainer(kind, images, tmp_path / str(value), batch_size=2, **{option: value})
        run.train_step(next(run.batches()))
        gradients.append({n: p.grad.clone() for n, p in run.tokenizer.named_parameters() if p.grad is not None})
        assert gradients[-1].keys() == gradients[0].keys()
    for name in gradients[0]:
        torch.testing.assert_close(gradients[0][name], gradients[1][name], rtol=1e-3, atol=1e-6)
