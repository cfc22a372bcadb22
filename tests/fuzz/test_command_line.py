"""Any words after ``msdd-fast``: a usage error, one line that says what is wrong, or done; never a traceback."""

import io
import os
from contextlib import redirect_stderr, redirect_stdout

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from msdd_fast.commands import main as cli
from msdd_fast.errors import InputError
from msdd_fast.io.latents import Latents, save_latents
from tests.fuzz.law import obeys

OPTIONS = (
    *("--out", "--output", "-o", "--checkpoint", "--device", "--seed", "--steps", "--cfg-scale", "--dtype", "--json"),
    *("--batch-size", "--overwrite", "--strict", "--shard-size", "--check", "-v", "-q", "--help", "--version", "--"),
    *("--config", "--preset", "--data", "--loop.steps", "--unknown", "-", "--out=", "--seed=-1", "--trace"),
)
VALUES = (
    *("z.safetensors", "photo.png", "photos", "nothing", "z.txt", "out.png", "out", "/dev/null", "/dev/full", ".", ""),
    *(
        "0",
        "1",
        "-1",
        "3.5",
        "nan",
        "1e400",
        "9" * 30,
        "auto",
        "cpu",
        "cuda:99",
        "float32",
        "msdd-nano",
        "tiny",
        "a\nb",
    ),
    *("x/../y", "\udcff", "a" * 300, "é", "pipe:false", "{}", "[", "*.png", "~", "~nobody/x"),
)
WORDS = st.lists(st.sampled_from((*OPTIONS, *VALUES)), max_size=6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("words")
    save_latents(Latents(torch.zeros(1, 16, 32), ["a"]), path / "z.safetensors")
    (path / "photos").mkdir()
    Image.new("RGB", (8, 8)).save(path / "photo.png")
    Image.new("RGB", (8, 8)).save(path / "photos/a.png")
    (path / "z.txt").write_text("no latents")
    return path


@pytest.fixture(autouse=True)
def nothing_is_loaded(monkeypatch, folder):
    """Words are what is tried here: models, training and measurements are left out."""

    def stop(*args, **kwargs):
        raise InputError("enough")

    monkeypatch.chdir(folder)
    monkeypatch.setattr("msdd_fast.tokenizer.Tokenizer.from_pretrained", stop)
    for name in ("bench", "demo", "profile", "tune"):
        monkeypatch.setattr(f"msdd_fast.commands.{name}.run", stop)
    monkeypatch.setattr("msdd_fast.training.command_line.train", stop)


@settings(max_examples=settings.default.max_examples // 3)  # `train` and `distill` make large parsers
@given(st.sampled_from((*cli.COMMANDS, "nonsense", "")), WORDS, st.integers(0, 6))
def test_words(command, words, at):
    words = [*words[:at], command, *words[at:]]
    out, err = io.StringIO(), io.StringIO()

    def run():
        with redirect_stdout(out), redirect_stderr(err):
            try:
                return cli.main(words)
            except SystemExit as e:  # argparse's own: help, and usage errors
                return e.code

    def is_right(code):
        said = err.getvalue()
        assert "Traceback" not in said
        if code == 1:
            assert "msdd-fast: error: " in said
        return code in (0, 1, 2)

    obeys("words", run, is_right)
    assert not os.path.exists("RAN")
