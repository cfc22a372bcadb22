"""The command line with a PiD decoder saved to a folder."""

import json

import pytest
import torch

from msdd_fast import accelerate
from msdd_fast.commands import main as cli
from msdd_fast.families.pid.caption import save_features
from msdd_fast.io.images import load_image, to_image, to_tensor
from msdd_fast.io.latents import Latents, save_latents
from msdd_fast.layers.request import ways_of
from tests.families.pid.models import captions, latents, random_tokenizer


@pytest.fixture(scope="module")
def tiny():
    return random_tokenizer()


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("pid") / "tiny"
    tiny.save_pretrained(path)
    return path


@pytest.fixture
def run(folder, capsys):
    def run(command, *args):
        code = cli.main([command, *map(str, args), "--checkpoint", str(folder), "--device", "cpu"])
        return code, capsys.readouterr().err

    return run


@pytest.fixture
def files(tmp_path):
    """Latents of two images and caption features."""
    z, text = latents(2, 4, 1, 2), captions(1)
    save_latents(Latents(z, ["a", "b"]), tmp_path / "z.safetensors")
    save_features(text, tmp_path / "text.safetensors")
    return z, text


def test_decode(tiny, run, files, tmp_path):
    z, text = files
    out, features = tmp_path / "out", tmp_path / "text.safetensors"
    line = (tmp_path / "z.safetensors", "-o", out, "--dtype", "float32", "--steps", 2, "--sigma", 0.25)
    assert run("decode", *line, "--text-features", features) == (
        0,
        run("decode", *line, "--text-features", features)[1],
    )
    expected = accelerate(tiny, dtype=torch.float32, steps=2).decode(z, text=text, sigma=0.25)
    for image, name in zip(expected, ("a", "b"), strict=True):
        assert load_image(out / f"{name}.png").tobytes() == to_image(image).tobytes()
    record = json.loads((out / "decode.json").read_text())
    assert record["conditions"]["sigma"] == 0.25
    save_features(captions(1, seed=1), features)
    code, error = run("decode", *line, "--text-features", features)
    assert code != 0 and "was decoded with conditions" in error
    code, error = run("decode", *line, "--text-features", features, "--height", 48, "--overwrite")
    assert code == 0 and load_image(out / "a.png").size == (64, 48)


def test_tiles_of_a_memory_limit_with_conditions(tiny, run, tmp_path):
    z, given = latents(1, 4, 12, 8), {"text": captions(1), "sigma": 0.25}
    save_latents(Latents(z, ["a"]), tmp_path / "z.safetensors")
    save_features(given["text"], tmp_path / "text.safetensors")
    engine = accelerate(tiny, dtype=torch.float32, steps=1, batch_sizes=1)
    request = engine.request(z, conditions=engine.conditions(z, **given))
    untiled = [request._replace(way=way) for way in ways_of(engine.program, request) if not way.tile]
    limit = min(engine._budget.needed(r, 1) for r in untiled) - 1
    line = (tmp_path / "z.safetensors", "-o", tmp_path / "out", "--dtype", "float32", "--steps", 1, "--batch-size", 1)
    conditions = ("--text-features", tmp_path / "text.safetensors", "--sigma", 0.25)
    assert run("decode", *line, *conditions, "--max-memory", limit) == (0, "")
    assert json.loads((tmp_path / "out/decode.json").read_text())["tile"] == 128
    (expected,) = engine.decode(z, tile=128, **given)
    difference = to_tensor(load_image(tmp_path / "out/a.png")) - expected.clamp(-1, 1)
    assert difference.abs().max() < 2 / 255


def test_errors(run, files, tmp_path):
    source = tmp_path / "z.safetensors"
    for more, message in (
        ((), "text must be caption features"),
        (("--text-features", tmp_path / "none"), "is missing"),
        (("--text-features", tmp_path / "text.safetensors", "--sigma", 2), "sigma must be in [0, 1], got 2"),
        (("--text-features", tmp_path / "text.safetensors", "--height", 50), "height must be a multiple of 16"),
    ):
        code, error = run("decode", source, "-o", tmp_path / "out", *more)
        assert code != 0 and message in error, error
    assert not (tmp_path / "out").exists()
    code, error = run("encode", tmp_path, "-o", tmp_path / "e.safetensors")
    assert code != 0


def test_other_families_take_no_caption(files, tmp_path, capsys):
    save_latents(Latents(torch.zeros(1, 128, 32), ["a"]), tmp_path / "m.safetensors")
    line = ["decode", tmp_path / "m.safetensors", "-o", tmp_path / "out", "--sigma", 0.5]
    assert cli.main([*map(str, line), "--device", "cpu"]) != 0
    assert "takes no argument 'sigma'" in capsys.readouterr().err
