"""What encode, eval and reconstruct do with images that cannot be read, with weights that give NaN; how encode writes
and resumes shards."""

import hashlib
import json
import os
import re

import numpy as np
import pytest
import torch
from PIL import Image

import msdd_fast
from msdd_fast.commands import encoding
from msdd_fast.commands import main as cli
from msdd_fast.commands.inputs import printable, require_finite
from msdd_fast.diffusion import checks
from msdd_fast.errors import InputError
from msdd_fast.io.images import load_batch
from msdd_fast.io.latents import load_latents
from msdd_fast.metrics.image import psnr
from tests.perturbed import perturbed

SIZE = 64


@pytest.fixture(scope="module")
def tiny():
    return perturbed()


@pytest.fixture(scope="module")
def checkpoint(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("inputs") / "tiny"
    tiny.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def nan_encoder(tmp_path_factory):
    """A checkpoint whose encoder gives NaN, for dark images only."""
    return _broken(tmp_path_factory, "encoder")


@pytest.fixture(scope="module")
def nan_decoder(tmp_path_factory):
    return _broken(tmp_path_factory, "decoder")


def _broken(tmp_path_factory, part):
    tokenizer = msdd_fast.Tokenizer.from_config("tiny")
    with torch.no_grad():
        list(getattr(tokenizer, part).parameters())[-1].fill_(
            3e38
        )  # finite, as all weights are; what comes of it is not
    path = tmp_path_factory.mktemp("nan") / part
    tokenizer.save_pretrained(path)
    return path


def picture(path, seed, size=(70, 66)):
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8))
    coarse.resize(size, Image.Resampling.BICUBIC).save(path)


@pytest.fixture
def photos(tmp_path):
    """Seven names, of which b and e cannot be read."""
    folder = tmp_path / "photos"
    for i, name in enumerate("acdfg"):
        picture(folder / f"{name}.png", i)
    (folder / "b.png").write_text("no image")
    (folder / "e.jpg").write_bytes(b"")
    return folder


GOOD, INDEX = list("acdfg"), [0, 2, 3, 5, 6]


@pytest.fixture
def run(checkpoint, capsys):
    """Runs a command; returns exit code, stdout, stderr."""

    def run(command, *args, checkpoint=checkpoint):
        code = cli.main([command, *map(str, args), "--checkpoint", str(checkpoint), "--device", "cpu"])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def originals(photos):
    return load_batch([photos / f"{n}.png" for n in GOOD], SIZE)


PASSED_OVER = "msdd-fast: 2 of 7 images could not be read and were passed over\n"


def check_reasons(err):
    assert "b.png is not a readable image: its format is not known" in err
    assert "e.jpg is not a readable image: the file is empty" in err


def test_encode_passes_over(run, tiny, photos, tmp_path):
    out = tmp_path / "z.safetensors"
    code, text, err = run("encode", photos, "-o", out, "--batch-size", 2)
    assert code == 0 and "5 x 16 x 32" in text and err.endswith(PASSED_OVER)
    check_reasons(err)
    z, names = load_latents(out)
    assert names == GOOD
    torch.testing.assert_close(z, tiny.encode(originals(photos)), rtol=0, atol=1e-5)
    out.unlink()
    code, _, err = run("encode", photos, "-o", out, "--batch-size", 2, "--strict")
    assert code == 1 and err.endswith("msdd-fast: error: --strict: 2 of 7 images could not be read\n")
    check_reasons(err)
    assert load_latents(out).names == GOOD  # what could be read is written


def test_eval_passes_over_and_keeps_the_seeds(run, tiny, photos, tmp_path):
    pytest.importorskip("skimage")
    report = tmp_path / "r.json"
    code, text, err = run("eval", photos, "--json", report, "--seed", 3, "--steps", 1, "--batch-size", 3)
    assert code == 0 and err.endswith(PASSED_OVER)
    check_reasons(err)
    content = json.loads(report.read_text())
    assert (content["count"], content["unreadable"]) == (5, 2) and "unreadable       2" in text
    x = originals(photos)
    expected = psnr(tiny.decode(tiny.encode(x), [3 + i for i in INDEX], 1), x).tolist()
    assert list(content["images"]) == [str(photos / f"{n}.png") for n in GOOD]
    assert [i["psnr_db"] for i in content["images"].values()] == pytest.approx(expected, abs=1e-3)
    report.unlink()
    code, _, err = run("eval", photos, "--json", report, "--steps", 1, "--strict")
    assert code == 1 and "--strict: 2 of 7 images could not be read" in err and report.exists()


def test_reconstruct_passes_over_and_keeps_the_seeds(run, tiny, photos, tmp_path):
    out = tmp_path / "r.png"
    code, text, err = run("reconstruct", photos, "-o", out, "--seed", 3, "--steps", 1)
    assert code == 0 and err.endswith(PASSED_OVER) and text.count(" dB") == 5
    check_reasons(err)
    assert Image.open(out).height == 5 * SIZE + 4 * 4
    x = originals(photos)
    for name, value in zip(GOOD, psnr(tiny.decode(tiny.encode(x), [3 + i for i in INDEX], 1), x).tolist(), strict=True):
        line = next(line for line in text.splitlines() if f"{name}.png: " in line)
        assert float(line.split(": ")[1].removesuffix(" dB")) == pytest.approx(value, abs=0.011)
    code, _, err = run("reconstruct", photos, "-o", out, "--steps", 1, "--strict")
    assert code == 1 and "--strict: 2 of 7 images could not be read" in err


@pytest.mark.parametrize("command", ["encode", "eval", "reconstruct"])
def test_nothing_readable(run, photos, tmp_path, command):
    for name in GOOD:
        (photos / f"{name}.png").write_text("broken")
    output = {"encode": ("-o", "z.safetensors"), "eval": ("--json", "r.json"), "reconstruct": ("-o", "r.png")}[command]
    code, _, err = run(command, photos, output[0], tmp_path / output[1])
    assert code == 1 and err.count("\n") == 1
    assert "error: none of 7 images can be read, the first: " in err and "a.png is not a readable image" in err
    assert not (tmp_path / output[1]).exists()


@pytest.mark.parametrize("command", ["encode", "eval", "reconstruct"])
@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_weights_that_give_nan(run, photos, tmp_path, command, part, nan_encoder, nan_decoder):
    if (command, part) == ("encode", "decoder"):
        pytest.skip("encode does not decode")
    output = {"encode": ("-o", "z.safetensors"), "eval": ("--json", "r.json"), "reconstruct": ("-o", "r.png")}[command]
    args = () if command == "encode" else ("--steps", 1)
    weights = nan_encoder if part == "encoder" else nan_decoder
    code, _, err = run(command, photos, output[0], tmp_path / output[1], *args, checkpoint=weights)
    assert code == 1
    doing = "encoding" if part == "encoder" else "decoding"
    assert f"error: {doing} gave NaN or Inf for " in err
    if command != "reconstruct":
        assert f"for {photos / 'a.png'}\n" in err
    assert not (tmp_path / output[1]).exists()


def test_demo_with_weights_that_give_nan(run, tmp_path, nan_decoder):
    pytest.importorskip("skimage.data")
    code, _, err = run("demo", "--out", tmp_path / "d.png", "--steps", 1, checkpoint=nan_decoder)
    assert code == 1 and "error: decoding gave NaN or Inf for astronaut" in err
    assert not (tmp_path / "d.png").exists()


def test_the_one_that_is_not_finite_is_named():
    x = torch.zeros(3, 2, 2)
    require_finite("decoding", x, "abc")
    x[1, 0, 1] = float("inf")
    with pytest.raises(InputError, match=r"^decoding gave NaN or Inf for b$"):
        require_finite("decoding", x, "abc")


# --- encode: shards, dtype


def digests(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def test_shards(run, tiny, photos, tmp_path):
    out = tmp_path / "z"
    code, text, err = run("encode", photos, "-o", out, "--shard-size", 3, "--batch-size", 2)
    assert code == 0 and f"wrote {out}/: 5 x 16 x 32" in text and err.endswith(PASSED_OVER)
    assert sorted(os.listdir(out)) == ["000000.safetensors", "000001.safetensors", "000002.safetensors", "encode.json"]
    shards = [load_latents(out / f"00000{i}.safetensors") for i in range(3)]
    assert [s.names for s in shards] == [["a", "c"], ["d", "f"], ["g"]]
    z = torch.cat([s.z for s in shards])
    torch.testing.assert_close(z, tiny.encode(originals(photos)), rtol=0, atol=1e-5)
    (out / ".1f2e.safetensors").write_bytes(b"what a killed run leaves")
    code, text, _ = run("decode", out, "-o", tmp_path / "decoded", "--steps", 1)
    assert code == 0 and "wrote 5 pictures" in text
    assert sorted(os.listdir(tmp_path / "decoded")) == sorted(
        ["decode.json", *(f"{n}.png" for n in GOOD)]
    )  # as from one file


def test_a_shard_without_a_readable_image(run, photos, tmp_path):
    (photos / "a.png").write_text("broken")
    code, text, _ = run("encode", photos, "-o", tmp_path / "z", "--shard-size", 2)
    assert code == 0 and "4 x 16 x 32" in text
    assert load_latents(tmp_path / "z/000000.safetensors").z.shape == (0, 16, 32)
    assert run("decode", tmp_path / "z", "-o", tmp_path / "decoded", "--steps", 1)[0] == 0


@pytest.mark.parametrize("survive", [0, 1, 2])
def test_an_interrupted_encode_resumes(run, photos, tmp_path, monkeypatch, survive):
    options = ("--shard-size", 3, "--batch-size", 2)
    run("encode", photos, "-o", tmp_path / "whole", *options)
    whole, out = digests(tmp_path / "whole"), tmp_path / "z"
    save, written = encoding.save_latents, []

    def interrupted(latents, path):
        if len(written) == survive:
            raise KeyboardInterrupt
        written.append(path)
        save(latents, path)

    monkeypatch.setattr(encoding, "save_latents", interrupted)
    assert run("encode", photos, "-o", out, *options)[0] == 130
    monkeypatch.undo()
    assert len(digests(out)) == survive + 1
    for path in out.glob("*.safetensors"):
        os.utime(path, (1, 1))
    code, text, err = run("encode", photos, "-o", out, *options)
    assert code == 0 and err.endswith(PASSED_OVER)
    assert (f"{survive} of 3 shards are already there" in text) == (survive > 0)
    assert digests(out) == whole
    assert sum(p.stat().st_mtime == 1 for p in out.glob("*.safetensors")) == survive
    code, text, err = run("encode", photos, "-o", out, *options, "--strict")  # nothing is left to do
    assert code == 1 and "3 of 3 shards are already there" in text
    assert "b.png was not readable in an earlier run" in err and digests(out) == whole


def test_a_damaged_shard_is_written_again(run, photos, tmp_path):
    out, options = tmp_path / "z", ("--shard-size", 3)
    run("encode", photos, "-o", out, *options)
    whole = digests(out)
    (out / "000001.safetensors").write_bytes(b"half")
    (out / ".1f2e.safetensors").write_bytes(b"what a killed run leaves")
    code, text, _ = run("encode", photos, "-o", out, *options)
    assert code == 0 and "2 of 3 shards are already there" in text
    (out / ".1f2e.safetensors").unlink()
    assert digests(out) == whole


def test_a_folder_of_another_run_is_refused(run, photos, tmp_path, nan_decoder):
    out = tmp_path / "z"
    run("encode", photos, "-o", out, "--shard-size", 3)
    before = digests(out)
    for args, what in (
        (("--shard-size", 4), "shard_size"),
        (("--shard-size", 3, "--dtype", "float16"), "dtype"),
    ):
        code, _, err = run("encode", photos, "-o", out, *args)
        assert code == 1 and f"holds latents of another run (other {what}): use --overwrite" in err
    code, _, err = run("encode", photos, "-o", out, "--shard-size", 3, checkpoint=nan_decoder)
    assert code == 1 and "(other encoder)" in err
    picture(photos / "h.png", 9)
    code, _, err = run("encode", photos, "-o", out, "--shard-size", 3)
    assert code == 1 and "(other images, names)" in err
    assert digests(out) == before
    (out / "encode.json").write_text("[]")
    assert "holds latents of another run" in run("encode", photos, "-o", out, "--shard-size", 3)[2]
    code, _, _ = run("encode", photos, "-o", out, "--shard-size", 8, "--overwrite")
    assert code == 0 and sorted(os.listdir(out)) == ["000000.safetensors", "encode.json"]
    (out / "mine.safetensors").touch()
    code, _, err = run("encode", photos, "-o", out, "--shard-size", 8, "--overwrite")
    assert code == 1 and "must hold nothing but shards of this command, got mine.safetensors" in err


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtype(run, tiny, photos, tmp_path, dtype):
    out = tmp_path / "z.safetensors"
    assert run("encode", photos, "-o", out, "--dtype", dtype)[0] == 0
    z = load_latents(out).z
    assert z.dtype == getattr(torch, dtype)
    torch.testing.assert_close(z.float(), tiny.encode(originals(photos)), rtol=1e-2, atol=1e-2)
    assert run("decode", out, "-o", tmp_path / "decoded", "--steps", 1)[0] == 0


def test_latents_beyond_a_dtype_are_an_error(run, photos, tmp_path, monkeypatch):
    encode = msdd_fast.Tokenizer.encode
    monkeypatch.setattr(msdd_fast.Tokenizer, "encode", lambda self, images: encode(self, images) + 1e6)
    code, _, err = run("encode", photos, "-o", tmp_path / "z.safetensors", "--dtype", "float16")
    assert code == 1 and f"rounding to float16 gave NaN or Inf for {photos / 'a.png'}" in err


def test_one_file_has_a_limit(run, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "MAX_FILE_BYTES", 7 * 16 * 32 * 4 - 1)
    code, _, err = run("encode", photos, "-o", tmp_path / "z.safetensors", "--batch-size", 2)
    assert code == 1 and "--out must be a folder for latents of more than" in err
    assert not (tmp_path / "z.safetensors").exists()
    assert run("encode", photos, "-o", tmp_path / "z.safetensors", "--dtype", "bfloat16")[0] == 0


def test_shard_size_needs_a_folder(run, photos, tmp_path):
    code, _, err = run("encode", photos, "-o", tmp_path / "z.safetensors", "--shard-size", 3)
    assert code == 1 and "--shard-size needs a folder as --out, got" in err
    (tmp_path / "file").touch()
    assert "--out must end in .safetensors, got" in run("encode", photos, "-o", tmp_path / "file")[2]


@pytest.mark.parametrize("name", ["a\0b", "x" * 5000, ""])
def test_names_that_no_file_can_have(run, tmp_path, photos, name):
    for command, args in (
        ("encode", (name, "-o", tmp_path / "z.safetensors")),
        ("eval", (name,)),
        ("reconstruct", (name, "-o", tmp_path / "r.png")),
    ):
        code, _, err = run(command, *args)
        assert code == 1 and err.count("\n") == 1 and err.startswith("msdd-fast: error: ")
    code, _, err = run("encode", photos, "-o", name)
    assert code == 1 and err.count("\n") == 1
    assert os.listdir(tmp_path) == ["photos"]


def test_a_name_that_the_terminal_cannot_say(run, tmp_path):
    name = os.fsdecode(b"\xff.png")
    picture(tmp_path / "photos" / "x.png", 0)
    os.rename(tmp_path / "photos" / "x.png", tmp_path / "photos" / name)
    code, text, _ = run("reconstruct", tmp_path / "photos", "-o", tmp_path / "r.png", "--steps", 1)
    assert code == 0 and printable(name) in text
    assert run("encode", tmp_path / "photos", "-o", tmp_path / "z.safetensors")[0] == 0


# --- tok.encode


@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 255.0), (0.0, 1.51), (-2.1, 2.6), (-1.6, 0.0)], ids=["bytes", "above", "ImageNet", "below"]
)
def test_values_far_from_the_range_are_refused(tiny, low, high):
    images = torch.linspace(low, high, 3 * SIZE * SIZE).reshape(1, 3, SIZE, SIZE)
    message = f"images must be in [-1, 1], got {low:g} to {high:g}; pixels in [0, 255] become x / 127.5 - 1"
    with pytest.raises(InputError, match=re.escape(message)):
        tiny.encode(images)


def test_images_from_0_to_1_give_one_warning(tiny, recwarn):
    checks._warn_of_unit_range.cache_clear()
    images = torch.linspace(0, 1, 3 * SIZE * SIZE).reshape(1, 3, SIZE, SIZE)
    for quiet in (images * 2 - 1, images.clamp(1, 1), torch.zeros_like(images), images * 3 - 1.5, images[:0]):
        tiny.encode(quiet)
    assert not recwarn.list
    with pytest.warns(
        UserWarning, match=r"all values of the images are in \[0, 1\], but images must be in \[-1, 1\]"
    ) as w:
        tiny.encode(images)
        tiny.encode(images)
    assert len(w) == 1 and w[0].filename == __file__


def test_commands_do_not_warn_of_bright_images(run, tmp_path, recwarn):
    checks._warn_of_unit_range.cache_clear()
    Image.fromarray(np.linspace(150, 250, 64 * 64).reshape(64, 64).astype(np.uint8)).save(tmp_path / "a.png")
    assert run("encode", tmp_path / "a.png", "-o", tmp_path / "z.safetensors")[2] == ""
    assert not recwarn.list
