"""From a folder of pictures to a distilled, accelerated decoder, by the command line."""

import json

import pytest
import torch

from msdd_fast import Tokenizer, accelerate
from msdd_fast.commands.main import main
from msdd_fast.metrics.image import psnr
from msdd_fast.training.data import ImageDataset, find_images

pytest.importorskip("tyro")
LOOP = ["--loop.steps", "20", "--loop.batch-size", "4", "--loop.workers", "0", "--loop.log-every", "1"]
LOOP += ["--loop.device", "cpu"]


def losses(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert all(abs(v) < float("inf") for line in lines for v in line.values())  # NaN, too, fails
    return lines


def mean(lines, name):
    return sum(line[name] for line in lines) / len(lines)


@pytest.fixture(scope="module")
def teacher(images, tmp_path_factory):
    out = tmp_path_factory.mktemp("stage1")
    options = ["--optim.lr", "3e-3", "--optim.warmup-steps", "3", "--optim.ema-decay", "0.5"]
    options += ["--loop.precision", "float32"]
    assert main(["train", "--data", str(images), "--out", str(out), "--preset", "tiny", *options, *LOOP]) == 0
    log = losses(out)
    assert mean(log[-5:], "loss") < 0.7 * mean(log[:5], "loss")
    return out / "checkpoint"


def test_scales_of_the_preset_can_be_overruled(images, tmp_path, capsys):
    out = tmp_path / "single"
    options = ["--data", str(images), "--preset", "tiny", "--loop.steps", "1", "--loop.precision", "float32"]
    assert main(["train", *options, *LOOP[2:], "--out", str(out), "--num-stages", "1"]) == 0
    assert len(Tokenizer.from_pretrained(out / "checkpoint").schedule) == 1
    assert "mse/64" in losses(out)[0] and "mse/32" not in losses(out)[0]
    assert main(["train", *options, *LOOP[2:], "--out", str(tmp_path / "none"), "--num-stages", "0"]) == 1
    assert "num_stages must be 1 to 10, got 0" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("recipe", ["adversarial", "teacher-matching"])
def test_distil_save_load_accelerate_decode(images, teacher, tmp_path, recipe):
    out = tmp_path / "stage2"
    options = ["--objective.recipe", recipe, "--objective.image-weight", "1", "--perceptual", "random"]
    options += ["--discriminator", "random"] if recipe == "adversarial" else ["--objective.teacher-steps", "3"]
    options += ["--optim.lr", "2e-3", "--optim.warmup-steps", "2", "--optim.ema-decay", "0.5"]
    options += ["--loop.precision", "float32"]
    where = ["--data", str(images), "--out", str(out), "--teacher", str(teacher)]
    assert main(["distill", *where, *options, *LOOP]) == 0
    log = losses(out)
    assert mean(log[-5:], "image_mse") < 0.9 * mean(log[:5], "image_mse")
    assert mean(log[-5:], "reconstruction") > 0
    assert (recipe == "adversarial") == ("random-vit/discriminator" in log[0])

    before, student = Tokenizer.from_pretrained(teacher), Tokenizer.from_pretrained(out / "checkpoint")
    dataset = ImageDataset(find_images([images]), 64, seed=1)
    x = torch.stack([dataset[i] for i in range(4)])
    z = student.encode(x)
    assert torch.equal(z, before.encode(x))  # one encoder for both
    y = student.decode(z)
    assert float(psnr(y, x).mean()) > float(psnr(before.decode(z), x).mean())
    fast = accelerate(student, dtype=torch.float32, backend="eager")  # "auto" may take Triton's interpreter: slow
    torch.testing.assert_close(fast.decode(z), y, rtol=0, atol=2e-3)
    assert (out / "samples/000020.png").exists()
    assert json.loads((out / "config.json").read_text())["objective"]["recipe"] == recipe


def test_one_clear_error_each(images, teacher, tmp_path, capsys):
    def error(*options):
        capsys.readouterr()
        out = tmp_path / "never"
        assert main(["distill", "--data", str(images), "--out", str(out), "--teacher", str(teacher), *options]) == 1
        message = capsys.readouterr().err.strip().splitlines()[-1]
        assert not out.exists()  # before the first step and before anything is written
        return message

    matching = ("--objective.recipe", "teacher-matching")
    assert error("--perceptual", "random").startswith(
        "msdd-fast: error: recipe 'adversarial' needs discriminator, the file of its backbone or 'vgg19', got none: "
    )
    assert "discriminator backbone not found: 'no.pth' is neither a file" in error(
        *("--perceptual", "random", "--discriminator", "no.pth")
    )
    assert "perceptual 'vgg19' needs the file vgg19, got none" in error(*matching)
    weights = teacher / "model.safetensors"
    assert "model.safetensors is not the VGG-19 feature network" in error(*matching, "--vgg19", str(weights))
    assert "student must have the teacher's image_size, 64, got 128" in error(
        *matching, "--perceptual", "random", "--student", "msdd-nano"
    )
    assert "no checkpoint 'nothing'" in error(*matching, "--teacher", "nothing")
    assert "data must be folders or .tar shards" in error(
        *matching, "--perceptual", "random", "--data", str(tmp_path / "none")
    )
