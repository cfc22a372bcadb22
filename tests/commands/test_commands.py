"""The command line, in-process: what the commands write, how they fail, how they resume."""

import argparse
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import msdd_fast
from msdd_fast.commands import decoding
from msdd_fast.commands import main as cli
from msdd_fast.diffusion.config import SamplingConfig
from msdd_fast.io.images import center_crop, load_image, save_image, to_tensor
from msdd_fast.io.latents import Latents, load_latents, save_latents
from msdd_fast.metrics.image import psnr, ssim
from msdd_fast.ops._patches import to_uint8
from tests.perturbed import perturbed

SIZE, TOKENS, DIM = 64, 16, 32  # of the tiny preset


@pytest.fixture(scope="module")
def tiny():
    return perturbed()


@pytest.fixture(scope="module")
def checkpoint(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("cli") / "tiny"
    tiny.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of three pictures of different shapes and formats, one in a sub-folder."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for name, width, height in (("a.png", 70, 90), ("b.jpg", 128, 64), ("sub/c.png", 40, 50)):
        (folder / name).parent.mkdir(exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        coarse.resize((width, height), Image.Resampling.BICUBIC).save(folder / name)
    return folder


@pytest.fixture(scope="module")
def latents():
    return Latents(torch.randn(5, TOKENS, DIM, generator=torch.Generator().manual_seed(0)), list("vwxyz"))


@pytest.fixture
def z_file(latents, tmp_path):
    save_latents(latents, tmp_path / "z.safetensors")
    return tmp_path / "z.safetensors"


@pytest.fixture
def run(checkpoint, capsys):
    """Runs a command with the tiny checkpoint; returns exit code, stdout, stderr."""

    def run(command, *args):
        if command not in ("env", "convert"):
            args = (*args, "--checkpoint", checkpoint, "--device", "cpu")
        code = cli.main([command, *map(str, args)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def fails(run):
    """Runs a command that must fail with one line on stderr; returns that line without its head."""

    def fails(command, *args):
        code, _, err = run(command, *args)
        assert code == 1, err
        assert err.endswith("\n") and err.count("\n") == 1, err
        assert err.startswith("msdd-fast: error: ")
        assert "Traceback" not in err
        return err.removeprefix("msdd-fast: error: ").rstrip()

    return fails


@pytest.fixture
def succeeds(run):
    def succeeds(command, *args):
        code, out, err = run(command, *args)
        assert (code, err) == (0, "")
        return out

    return succeeds


def tree(folder):
    """Every file below a folder, hidden ones too."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def pictures(folder):
    """The pictures that decode has written, and the options that lie beside them."""
    names = tree(folder)
    assert "decode.json" in names
    return [name for name in names if name != "decode.json"]


def pixels(path):
    return torch.from_numpy(np.asarray(Image.open(path)).copy()).permute(2, 0, 1)


def nearly_equal(a, b):
    """Two pictures that may differ by rounding before they were quantised: one level, in one value of a thousand."""
    difference = (a.int() - b.int()).abs()
    return a.shape == b.shape and int(difference.max()) <= 1 and float(difference.float().mean()) < 1e-3


def inputs(photos):
    return torch.stack([to_tensor(center_crop(load_image(photos / n), SIZE)) for n in ("a.png", "b.jpg", "sub/c.png")])


# --- reconstruct, eval, env, demo


def test_reconstruct(succeeds, tiny, photos, tmp_path):
    out = succeeds("reconstruct", photos / "a.png", photos / "b.jpg", "-o", tmp_path / "new" / "r.png", "--seed", 4)
    assert tree(tmp_path) == ["new/r.png"]
    # Original, the three coarser scales, the result; two rows; gaps of 4.
    image = Image.open(tmp_path / "new" / "r.png")
    assert image.size == (5 * SIZE + 4 * 4, 2 * SIZE + 4)
    x = inputs(photos)[:2]
    y = tiny.decode(tiny.encode(x), seed=4)
    shown = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)
    assert torch.equal(shown[:, :SIZE, :SIZE], to_uint8(x[0]))
    assert nearly_equal(shown[:, SIZE + 4 :, -SIZE:], to_uint8(y[1]))
    for name, value in zip(("a.png", "b.jpg"), psnr(y, x).tolist(), strict=True):
        assert f"{name}: {value:.2f} dB" in out


def test_reconstruct_a_folder(succeeds, photos, tmp_path):
    out = succeeds("reconstruct", photos, "-o", tmp_path / "r.png")
    assert out.count(" dB") == 3


def test_eval(succeeds, tiny, photos, tmp_path):
    pytest.importorskip("skimage")
    report_file = tmp_path / "new" / "report.json"
    out = succeeds("eval", photos, "--json", report_file, "--batch-size", 2, "--seed", 7, "--steps", 2)
    assert tree(tmp_path) == ["new/report.json"]
    report = json.loads(report_file.read_text())
    assert (report["count"], report["seed"], report["steps_per_scale"], report["cfg_scale"]) == (3, 7, 2, 1.0)
    assert report["set"] == str(photos) and "64 px" in report["crop"]
    assert set(report["images"]) == {str(photos / n) for n in ("a.png", "b.jpg", "sub/c.png")}
    x = inputs(photos)
    y = tiny.decode(tiny.encode(x), seed=7, steps=2)
    for name, metric in (("psnr_db", psnr), ("ssim", ssim)):
        values = [image[name] for image in report["images"].values()]
        assert values == pytest.approx(metric(y, x).tolist(), abs=1e-3)
        assert report["mean"][name] == pytest.approx(sum(values) / 3)
        assert f"{report['mean'][name]:.4f}" in out


def test_eval_with_vgg(succeeds, photos, tmp_path, shared_dir):
    pytest.importorskip("skimage")
    weights = shared_dir / "data" / "weights" / "vgg19_normalised" / "vgg_normalised_conv3_1.pth"
    succeeds("eval", photos / "a.png", "--vgg19", weights, "--json", tmp_path / "r.json")
    assert json.loads((tmp_path / "r.json").read_text())["mean"]["vgg19_distance"] > 0


def test_env(succeeds):
    report = json.loads(succeeds("env", "--json"))
    assert report["msdd_fast"] == msdd_fast.__version__
    assert report["packages"]["torch"] == torch.__version__
    assert report["cpu"]["cores"] >= 1
    out = succeeds("env")
    assert f"torch: {torch.__version__}" in out and "extension: " in out


def test_demo(succeeds, tmp_path):
    pytest.importorskip("skimage.data")
    out = succeeds("demo", "--out", tmp_path / "demo.png", "--batch-size", 2)
    assert Image.open(tmp_path / "demo.png").size == (5 * 256 + 4 * 4, 4 * 256 + 3 * 4)
    assert out.count(" dB") == 4
    for name in ("8 px", "16 px", "32 px", "64 px", "whole decode"):
        assert name in out


# --- encode and decode


def test_encode_then_decode(succeeds, tiny, photos, tmp_path):
    z_file, out = tmp_path / "z.safetensors", tmp_path / "out"
    succeeds("encode", photos, "-o", z_file, "--batch-size", 2)
    z, names = load_latents(z_file)
    assert names == ["a", "b", "sub/c"]
    torch.testing.assert_close(z, tiny.encode(inputs(photos)), rtol=0, atol=1e-5)
    succeeds("decode", z_file, "-o", out, "--seed", 5, "--steps", 2, "--cfg-scale", 1.5)
    assert pictures(out) == ["a.png", "b.png", "sub/c.png"]
    expected = to_uint8(tiny.decode(z, seed=5, steps=2, cfg_scale=1.5))
    for i, name in enumerate(names):
        assert nearly_equal(pixels(out / f"{name}.png"), expected[i])


def test_encode_one_picture_decode_one_picture(succeeds, tiny, photos, tmp_path):
    succeeds("encode", photos / "a.png", "-o", tmp_path / "z.safetensors")
    z, names = load_latents(tmp_path / "z.safetensors")
    assert names == ["a"]
    succeeds("decode", tmp_path / "z.safetensors", "-o", tmp_path / "picture.png")
    assert nearly_equal(pixels(tmp_path / "picture.png"), to_uint8(tiny.decode(z))[0])


def test_sampling_defaults_come_from_the_checkpoint(tiny, z_file, latents, tmp_path, capsys):
    config = msdd_fast.TokenizerConfig(**{**vars(tiny.config), "sampling": SamplingConfig(steps=2, cfg_scale=3.0)})
    tok = msdd_fast.Tokenizer.from_config(config)
    tok.load_state_dict(tiny.state_dict())
    tok.save_pretrained(tmp_path / "ckpt")
    args = ["decode", z_file, "-o", tmp_path / "out", "--checkpoint", tmp_path / "ckpt", "--device", "cpu"]
    assert cli.main([str(a) for a in args]) == 0
    expected = to_uint8(tiny.decode(latents.z, steps=2, cfg_scale=3.0))
    assert nearly_equal(pixels(tmp_path / "out" / "w.png"), expected[1])


def test_decode_resumes(succeeds, z_file, tmp_path):
    out = tmp_path / "out"
    succeeds("decode", z_file, "-o", out)
    before = {name: (out / name).read_bytes() for name in pictures(out)}
    for name in before:
        os.utime(out / name, (1, 1))
    (out / "x.png").unlink()
    text = succeeds("decode", z_file, "-o", out)
    assert "4 of 5 are already there" in text and "wrote 1 pictures" in text
    assert {name: (out / name).read_bytes() for name in pictures(out)} == before
    assert [name for name in before if (out / name).stat().st_mtime > 1] == ["x.png"]
    assert "wrote 0 pictures" in succeeds("decode", z_file, "-o", out)
    succeeds("decode", z_file, "-o", out, "--overwrite", "--seed", 1)
    after = {name: (out / name).read_bytes() for name in pictures(out)}
    assert after.keys() == before.keys() and all(after[name] != before[name] for name in before)


@pytest.mark.parametrize(
    ("options", "differs"),
    [
        (("--seed", 1), "seed 0 instead of 1"),
        (("--steps", 2), "steps 1 instead of 2"),
        (("--cfg-scale", 2), "cfg_scale 1.0 instead of 2.0"),
        (("--dtype", "float16"), "dtype 'float32' instead of 'float16'"),
    ],
)
def test_pictures_of_other_options_are_not_taken_for_done(succeeds, fails, z_file, tmp_path, options, differs):
    out = tmp_path / "out"
    succeeds("decode", z_file, "-o", out, "--dtype", "float32")
    before = {name: (out / name).read_bytes() for name in tree(out)}
    dtype = () if options[0] == "--dtype" else ("--dtype", "float32")
    message = fails("decode", z_file, "-o", out, *options, *dtype)
    assert "v.png was decoded with" in message and differs in message and "--overwrite" in message
    assert {name: (out / name).read_bytes() for name in tree(out)} == before
    succeeds("decode", z_file, "-o", out, *options, *dtype, "--overwrite")
    assert json.loads((out / "decode.json").read_text()) != json.loads(before["decode.json"])
    succeeds("decode", z_file, "-o", out, *options, *dtype)


def test_pictures_of_another_model_or_latents_or_of_nobody(succeeds, fails, tiny, latents, z_file, tmp_path, capsys):
    out, other = tmp_path / "out", perturbed(seed=1)
    other.save_pretrained(tmp_path / "other")
    succeeds("decode", z_file, "-o", out)
    args = ["decode", z_file, "-o", out, "--checkpoint", tmp_path / "other", "--device", "cpu"]
    assert cli.main([str(a) for a in args]) == 1
    assert "v.png was decoded with model '" in capsys.readouterr().err
    save_latents(Latents(latents.z + 1, latents.names), z_file)
    assert "v.png was decoded with latents '" in fails("decode", z_file, "-o", out)
    (out / "decode.json").unlink()
    assert "v.png is there, and " in fails("decode", z_file, "-o", out)
    (out / "decode.json").write_text("[" * 100_000)
    assert "does not say how it was decoded" in fails("decode", z_file, "-o", out)
    save_latents(Latents(latents.z[:1], ["v"]), z_file)
    succeeds("decode", z_file, "-o", tmp_path / "v.png")
    assert "v.png was decoded with seed 0" in fails("decode", z_file, "-o", tmp_path / "v.png", "--seed", 3)


def test_overwrite_that_is_interrupted_leaves_no_picture_of_the_older_options(
    run, succeeds, z_file, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    succeeds("decode", z_file, "-o", out)

    def interrupted(image, path):
        raise KeyboardInterrupt

    monkeypatch.setattr(decoding, "save_image", interrupted)
    assert run("decode", z_file, "-o", out, "--overwrite", "--seed", 1)[0] == 130
    assert pictures(out) == []


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_interrupted_decode(run, succeeds, z_file, tmp_path, monkeypatch, batch_size):
    whole, out = tmp_path / "whole", tmp_path / "out"
    options = ("--batch-size", batch_size)
    succeeds("decode", z_file, "-o", whole, *options)
    written = []

    def interrupted(image, path):
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(path)
        save_image(image, path)

    monkeypatch.setattr(decoding, "save_image", interrupted)
    code, _, err = run("decode", z_file, "-o", out, *options)
    assert (code, err) == (130, "msdd-fast: interrupted\n")
    assert pictures(out) == ["v.png", "w.png", "x.png"]
    monkeypatch.undo()
    assert "3 of 5 are already there" in succeeds("decode", z_file, "-o", out, *options)
    assert pictures(out) == pictures(whole)
    for name in pictures(whole):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name


def test_interrupt_inside_a_write_leaves_no_half_picture(run, z_file, tmp_path, monkeypatch):
    save = Image.Image.save

    def half(self, target):
        save(self, target)
        if not (tmp_path / "out" / "v.png").exists():
            return
        target.write_bytes(target.read_bytes()[:100])
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", half)
    assert run("decode", z_file, "-o", tmp_path / "out")[0] == 130
    assert pictures(tmp_path / "out") == ["v.png"]
    assert pixels(tmp_path / "out" / "v.png").shape == (3, SIZE, SIZE)


def test_pictures_do_not_depend_on_the_batch(succeeds, z_file, tmp_path):
    for size in (1, 2, 5):
        succeeds("decode", z_file, "-o", tmp_path / str(size), "--batch-size", size, "--seed", 9)
    for name in pictures(tmp_path / "1"):
        one = pixels(tmp_path / "1" / name).int()
        for size in ("2", "5"):
            assert (pixels(tmp_path / size / name).int() - one).abs().max() <= 1


def test_decode_a_folder_of_files(succeeds, latents, tmp_path, tiny):
    save_latents(Latents(latents.z[:2], ["v", "w"]), tmp_path / "in" / "one.safetensors")
    save_latents(Latents(latents.z[2:], ["v", "y", "z"]), tmp_path / "in" / "two.safetensors")
    succeeds("decode", tmp_path / "in", "-o", tmp_path / "out")
    assert pictures(tmp_path / "out") == ["one/v.png", "one/w.png", "two/v.png", "two/y.png", "two/z.png"]
    third = pixels(tmp_path / "out" / "two" / "v.png")  # of all, so seed 2
    assert torch.equal(third, to_uint8(msdd_fast.accelerate(tiny, batch_sizes=(8,)).decode(latents.z))[2])
    assert (third.int() - to_uint8(tiny.decode(latents.z))[2].int()).abs().max() <= 1  # eager rounds in its own way


def test_decode_nothing(succeeds, tmp_path):
    save_latents(Latents(torch.zeros(0, TOKENS, DIM), []), tmp_path / "z.safetensors")
    assert "wrote 0 pictures" in succeeds("decode", tmp_path / "z.safetensors", "-o", tmp_path / "out")


# --- convert


def test_convert(succeeds, fails, tmp_path):
    from tests.families.msdd.test_released import UNUSED, authors_state

    torch.save({"model": authors_state(0), "ema": authors_state(1), "args": argparse.Namespace()}, tmp_path / "a.pt")
    sizes = ("--image-size", 64, "--num-stages", 3)
    out = succeeds("convert", tmp_path / "a.pt", tmp_path / "out", *sizes, "--weights", "model")
    assert f"{len(UNUSED)} unused tensors left out: {', '.join(UNUSED)}" in out
    loaded = msdd_fast.Tokenizer.from_pretrained(tmp_path / "out")
    assert torch.equal(loaded.decoder.context_null, authors_state(0)["decoder.context_null"])
    succeeds("convert", tmp_path / "a.pt", tmp_path / "out", *sizes)
    loaded = msdd_fast.Tokenizer.from_pretrained(tmp_path / "out")
    assert torch.equal(loaded.decoder.context_null, authors_state(1)["decoder.context_null"])

    message = fails("convert", tmp_path / "a.pt", tmp_path / "bad", "--image-size", 100)
    assert "a.pt: image_size must be a multiple of" in message and "got 100" in message
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "x").touch()
    assert "directory must be empty" in fails("convert", tmp_path / "a.pt", tmp_path / "notes", *sizes)
    assert "none.pt is not a file" in fails("convert", tmp_path / "none.pt", tmp_path / "bad")
    torch.save(authors_state(), tmp_path / "cut.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "cut.pt").read_bytes()[:1000])
    assert "cut.pt is damaged" in fails("convert", tmp_path / "cut.pt", tmp_path / "bad")
    assert not (tmp_path / "bad").exists()


# --- mistakes: one line on stderr, exit code 1, nothing written


def test_bad_pictures(fails, photos, tmp_path):
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "empty").mkdir()
    (tmp_path / "cut.png").write_bytes((photos / "a.png").read_bytes()[:200])
    before = tree(tmp_path)
    for command, option in (("reconstruct", "-o"), ("encode", "-o"), ("eval", "--json")):
        output = tmp_path / "out" / {"reconstruct": "x.png", "encode": "x.safetensors", "eval": "x.json"}[command]
        assert "text.png is not a readable image" in fails(command, tmp_path / "text.png", option, output)
        assert "cut.png is not a readable image" in fails(command, tmp_path / "cut.png", option, output)
        assert "none.png is neither a file nor a folder" in fails(command, tmp_path / "none.png", option, output)
        assert "no images (" in fails(command, tmp_path / "empty", option, output)
    assert tree(tmp_path) == before


def test_unwritable_outputs(fails, photos, z_file, tmp_path, monkeypatch):
    """Refused before any work is done."""
    monkeypatch.setattr(msdd_fast.Tokenizer, "from_pretrained", None)
    (tmp_path / "file").write_text("x")
    for folder in (tmp_path / "file", tmp_path / "file" / "sub", "/proc/msdd"):
        assert f"cannot write {folder}/x.png: " in fails("reconstruct", photos, "-o", f"{folder}/x.png")
        assert f"cannot write {folder}/x.safetensors: " in fails("encode", photos, "-o", f"{folder}/x.safetensors")
        assert f"cannot write {folder}/x.json: " in fails("eval", photos, "--json", f"{folder}/x.json")
        assert f"cannot write {folder}/x.png: " in fails("demo", "--out", f"{folder}/x.png")
        assert f"cannot write {folder}/out/v.png: " in fails("decode", z_file, "-o", f"{folder}/out")
    assert "--out must be a folder or a picture file" in fails("decode", z_file, "-o", tmp_path / "file")
    assert "output must end in one of .bmp, " in fails("reconstruct", photos, "-o", tmp_path / "x.txt")
    assert "--out must end in .safetensors, got" in fails("encode", photos, "-o", tmp_path / "x.png")
    (tmp_path / "d.safetensors").mkdir()
    assert "output must be a file, got the folder" in fails("encode", photos, "-o", tmp_path / "d.safetensors")
    assert tree(tmp_path) == ["file", "z.safetensors"]


def test_unwritable_convert(fails, tmp_path):
    (tmp_path / "file").write_text("x")
    assert "directory must be a directory" in fails("convert", tmp_path / "a.pt", tmp_path / "file")


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--steps", 0, "steps must be an integer >= 1, got 0"),
        ("--steps", -3, "steps must be an integer >= 1, got -3"),
        ("--cfg-scale", -1, "cfg_scale must be a finite number >= 0, got -1.0"),
        ("--cfg-scale", "nan", "cfg_scale must be a finite number >= 0, got nan"),
        ("--seed", -1, "seed must be in [0, 2^63)"),
        ("--seed", 2**63, "seed must be in [0, 2^63)"),
    ],
)
@pytest.mark.parametrize("command", ["reconstruct", "decode", "eval"])
def test_bad_sampling(fails, photos, z_file, tmp_path, command, option, value, message):
    source = z_file if command == "decode" else photos / "a.png"
    output = ("--json", tmp_path / "x.json") if command == "eval" else ("-o", tmp_path / "x.png")
    if command == "decode":
        output = ("-o", tmp_path / "out")
    assert message in fails(command, source, *output, option, value)
    assert tree(tmp_path) == ["z.safetensors"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_latents_that_are_not_finite(fails, latents, tmp_path, bad):
    """Found before the first picture is written, even when a later batch holds them."""
    z = latents.z.clone()
    z[3, 2, 1] = bad
    save_latents(Latents(z, latents.names), tmp_path / "z.safetensors")
    message = fails("decode", tmp_path / "z.safetensors", "-o", tmp_path / "out", "--batch-size", 1)
    assert message == "latents must be finite, got NaN or Inf for 'y'"
    assert tree(tmp_path) == ["z.safetensors"]


def test_weights_that_give_nan(tiny, z_file, tmp_path, capsys):
    broken = msdd_fast.Tokenizer.from_config("tiny")
    with torch.no_grad():
        broken.decoder.final_layer.linear.weight.fill_(3e38)
    broken.save_pretrained(tmp_path / "ckpt")
    args = ["decode", z_file, "-o", tmp_path / "out", "--checkpoint", tmp_path / "ckpt", "--device", "cpu"]
    assert cli.main([str(a) for a in args]) == 1
    assert capsys.readouterr().err == "msdd-fast: error: decoding gave NaN or Inf for one of v, w, x, y, z\n"
    assert pictures(tmp_path / "out") == []


def test_bad_latents(fails, z_file, latents, tmp_path):
    out = ("-o", tmp_path / "out")
    assert "--out must be a folder for 5 images, got" in fails("decode", z_file, "-o", tmp_path / "one.png")
    for z, message in (
        (torch.zeros(2, TOKENS, DIM + 1), "z must have shape (B, 16, 32), got (2, 16, 33)"),
        (torch.zeros(2, TOKENS + 1, DIM), "z must have shape (B, 16, 32), got (2, 17, 32)"),
        (torch.zeros(TOKENS, DIM), "latents must be (N, tokens, dim) or (N, channels, height, width), got (16, 32)"),
        (torch.zeros(2, TOKENS, DIM, dtype=torch.int32), "z must be floating point, got torch.int32"),
    ):
        save_file({"latents": z}, tmp_path / "bad.safetensors")
        assert message in fails("decode", tmp_path / "bad.safetensors", *out)
    z_file.write_bytes(z_file.read_bytes()[:-50])
    assert "z.safetensors is damaged or not a safetensors file" in fails("decode", z_file, *out)
    assert "none.safetensors does not exist" in fails("decode", tmp_path / "none.safetensors", *out)
    (tmp_path / "empty").mkdir()
    assert "no .safetensors files in" in fails("decode", tmp_path / "empty", *out)
    save_latents(latents, tmp_path / "mixed" / "a.safetensors")
    save_file({"latents": torch.zeros(1, 3, 3)}, tmp_path / "mixed" / "b.safetensors")
    assert "must agree in shape, got (3, 3) and (16, 32)" in fails("decode", tmp_path / "mixed", *out)
    assert not (tmp_path / "out").exists()


def test_hostile_names_stay_in_the_folder(fails, tmp_path):
    names = json.dumps(["../../evil"])
    save_file({"latents": torch.zeros(1, TOKENS, DIM)}, tmp_path / "z.safetensors", {"names": names})
    message = fails("decode", tmp_path / "z.safetensors", "-o", tmp_path / "a" / "b")
    assert "names must be plain paths inside the output folder" in message
    assert tree(tmp_path) == ["z.safetensors"]


def error_of(capsys, *args):
    assert cli.main([str(a) for a in args]) == 1
    err = capsys.readouterr().err
    assert err.startswith("msdd-fast: error: ") and err.count("\n") == 1
    return err


def test_unknown_checkpoint(capsys, photos, tmp_path):
    err = error_of(capsys, "reconstruct", photos, "-o", tmp_path / "x.png", "--checkpoint", "nope", "--device", "cpu")
    assert "no checkpoint 'nope': expected a directory, a hub id 'owner/name' or a bundled name" in err
    err = error_of(capsys, "eval", photos, "--checkpoint", photos, "--device", "cpu")
    assert "is not a checkpoint: it has no config.json" in err
    assert not tree(tmp_path)


@pytest.mark.parametrize("device", ["nonsense", "cuda", "cuda:99", "meta", "mps", "xpu"])
def test_bad_device(capsys, photos, checkpoint, tmp_path, device):
    kind = device.split(":")[0]
    if kind in ("cuda", "mps", "xpu") and device != "cuda:99" and torch.get_device_module(kind).is_available():
        pytest.skip(f"{kind} is available here")
    output = tmp_path / "x.png"
    err = error_of(capsys, "reconstruct", photos, "-o", output, "--checkpoint", checkpoint, "--device", device)
    assert f"--device must name a torch device that works here, got {device!r}: " in err
    assert not tree(tmp_path)


def test_messages_with_line_breaks_become_one_line(fails, photos, tmp_path):
    assert "no ne.png is neither" in fails("reconstruct", tmp_path / "no\nne.png", "-o", tmp_path / "x.png")


# --- usage


@pytest.mark.parametrize("command", [None, *cli.COMMANDS])
def test_help(command, capsys):
    if command in ("train", "distill"):
        pytest.importorskip("tyro")
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"] if command else ["--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert out.lower().startswith("usage: msdd-fast" + (f" {command}" if command else ""))
    if command is None:
        assert all(name in out for name in cli.COMMANDS)


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"msdd-fast {msdd_fast.__version__}\n"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["paint"], "invalid choice: 'paint'"),
        (["env", "--nonsense"], "unrecognized arguments: --nonsense"),
        (["decode"], "the following arguments are required: source"),
        (["decode", "z", "--steps", "two"], "argument --steps: invalid int value: 'two'"),
        (["decode", "z", "--batch-size", "0"], "argument --batch-size: must be at least 1, got 0"),
        (["convert", "a", "b", "--weights", "best"], "argument --weights: invalid choice: 'best'"),
    ],
)
def test_wrong_usage(args, message, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(args)
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert message in captured.err and not captured.out


def test_train_forwards_its_options(capsys):
    pytest.importorskip("tyro")
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "--nonsense", "3"])
    assert stop.value.code == 2
    assert "nonsense" in capsys.readouterr().err


def test_module_runs_as_a_program():
    done = subprocess.run([sys.executable, "-m", "msdd_fast", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.startswith("usage: msdd-fast ")


def in_a_shell(line, **environment):
    """Exit code, stdout and stderr of a shell line with ``msdd-fast`` in it, as a function of its own process."""
    line = line.replace("msdd-fast", f"{sys.executable} -m msdd_fast")
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, env={**os.environ, **environment})
    return done.returncode, done.stdout, done.stderr


def test_alone_it_prints_help(capsys):
    assert cli.main([]) == 0
    said = capsys.readouterr().out
    assert said.startswith("usage: msdd-fast") and all(name in said for name in cli.COMMANDS)


# Their options are those of the families' classes and of the recipes' configurations, which import it.
HELP_WITH_PYTORCH = {"convert", "train", "distill"}


def test_help_and_version_import_nothing_heavy():
    """What takes its time are PyTorch and NumPy: without them, help is there in a tenth of a second."""
    code = """
import sys
from msdd_fast.commands.main import main

for words in sys.argv[1:]:
    try:
        main(words.split())
    except SystemExit as stop:
        assert stop.code == 0, words
    heavy = {"torch", "numpy", "PIL", "tqdm", "triton", "ray"} & {*sys.modules}
    assert not heavy, (words, heavy)
"""
    words = ["", "--help", "--version", *(f"{name} --help" for name in cli.COMMANDS if name not in HELP_WITH_PYTORCH)]
    subprocess.run([sys.executable, "-c", code, *words], check=True, stdout=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def helped():
    """(code, stdout, stderr) of ``msdd-fast NAME --help`` by name, all in one fresh process."""
    code = """
import contextlib, io, json
from msdd_fast.commands.main import COMMANDS, main
said = {}
for name in COMMANDS:
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            code = main([name, "--help"])
        except SystemExit as end:
            code = end.code or 0
    said[name] = code, out.getvalue(), err.getvalue()
print(json.dumps(said))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_help_without_extras(helped, name):
    """Optional packages may be missing: `train` and `distill` say so, the others do not need them for help."""
    code, out, err = helped[name]
    assert code == 0 and out.startswith(f"usage: msdd-fast {name}"), err


def test_verbosity_after_the_command(capsys):
    for words in (["-v", "env"], ["env", "-v"], ["env", "--quiet"], ["-q", "env"]):
        assert cli.main(words) == 0
    capsys.readouterr()


def test_the_reader_of_the_output_goes_away():
    code, _, err = in_a_shell("msdd-fast env | true; exit ${PIPESTATUS[0]}")
    assert (code, err) in ((141, ""), (0, ""))  # 0 where all had been written before the reader left


def test_closed_outputs():
    assert in_a_shell("msdd-fast env >&-") == (0, "", "")
    assert in_a_shell("msdd-fast decode nothing 2>&-") == (1, "", "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_behind_stdout():
    code, _, err = in_a_shell("msdd-fast env > /dev/full")
    assert code == 1 and err == "msdd-fast: error: No space left on device\n"


def test_env_ends_with_a_verdict(capsys, monkeypatch):
    monkeypatch.setattr("msdd_fast.backends.environment.shortcomings", list)
    assert cli.main(["env", "--check"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "verdict: everything that this machine can use is there"
    monkeypatch.setattr(
        "msdd_fast.backends.environment.shortcomings", lambda: ["no C++ ops: msdd_fast._C was not built: why"]
    )
    assert cli.main(["env"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "verdict: no C++ ops: msdd_fast._C was not built: why"
    assert cli.main(["env", "--check", "--json"]) == 1
    said = capsys.readouterr()
    assert (
        json.loads(said.out)["missing"]
        and said.err == "msdd-fast: error: no C++ ops: msdd_fast._C was not built: why\n"
    )


def test_what_is_missing_is_found(monkeypatch):
    from msdd_fast.backends import environment

    monkeypatch.setattr(environment, "extension_status", lambda: (False, "was not built: no compiler"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert environment.shortcomings() == ["no C++ ops: msdd_fast._C was not built: no compiler"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(environment, "extension_status", lambda: (True, "was built"))
    monkeypatch.setattr(environment, "build_info", lambda: {"cuda": False, "cuda_reason": "no nvcc"})
    assert environment.shortcomings() == ["no CUDA kernels, although there is a GPU: no nvcc"]
