"""The command line with an SSDD tokenizer saved to a folder."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from msdd_fast import FastDecoder, Tokenizer, accelerate
from msdd_fast.commands import main as cli
from msdd_fast.families.ssdd.presets import SSDD_PRESETS
from msdd_fast.io.images import center_crop, load_image, to_tensor
from msdd_fast.io.latents import Latents, load_latents, save_latents
from msdd_fast.layers.request import ways_of
from msdd_fast.metrics.image import psnr
from msdd_fast.ops._patches import to_uint8
from tests.families.ssdd.test_ssdd import random_tokenizer

SIZE = 64


@pytest.fixture(scope="module")
def tiny():
    return random_tokenizer()


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("ssdd") / "tiny"
    tiny.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    path = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for name, size in (("a.png", (70, 90)), ("b.png", (128, 64))):
        coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        coarse.resize(size, Image.Resampling.BICUBIC).save(path / name)
    return path


@pytest.fixture
def run(folder, capsys):
    """Runs a command; returns exit code, stdout, stderr."""

    def run(command, *args, named=True):
        more = ("--checkpoint", folder, "--device", "cpu") if named else ()
        code = cli.main([command, *map(str, (*args, *more))])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def inputs(photos):
    return torch.stack([to_tensor(center_crop(load_image(photos / n), SIZE)) for n in ("a.png", "b.png")])


def pixels(path):
    return torch.from_numpy(np.asarray(Image.open(path)).copy()).permute(2, 0, 1)


def nearly_equal(a, b):
    difference = (a.int() - b.int()).abs()
    return a.shape == b.shape and int(difference.max()) <= 1 and float(difference.float().mean()) < 1e-2


def test_encode_and_decode(run, tiny, photos, tmp_path):
    code, out, err = run("encode", photos, "-o", tmp_path / "z.safetensors")
    assert (code, err) == (0, "") and "2 x 4 x 8 x 8" in out
    latents = load_latents(tmp_path / "z.safetensors")
    assert latents.names == ["a", "b"]
    torch.testing.assert_close(latents.z, tiny.encode(inputs(photos)), rtol=1e-4, atol=1e-4)
    code, _, err = run("decode", tmp_path / "z.safetensors", "-o", tmp_path / "out", "--seed", 3, "--steps", 1)
    assert (code, err) == (0, "")
    expected = tiny.decode(latents.z, seed=3, steps=1)
    for name, image in zip("ab", expected, strict=True):
        assert nearly_equal(pixels(tmp_path / "out" / f"{name}.png"), to_uint8(image))


def test_encode_shards_with_none_readable(run, tiny, photos, tmp_path):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes((photos / name).read_bytes())
    (tmp_path / "0.png").write_text("no image")
    code, out, err = run("encode", tmp_path, "-o", tmp_path / "z", "--shard-size", 1)
    assert code == 0 and "2 x 4 x 8 x 8" in out and "1 of 3 images could not be read" in err
    assert load_latents(tmp_path / "z/000000.safetensors").z.shape == (0, 4, 8, 8)
    z = load_latents(tmp_path / "z/000002.safetensors").z
    torch.testing.assert_close(z, tiny.encode(inputs(photos)[1:]), rtol=1e-4, atol=1e-4)


def test_decode_in_bfloat16(run, tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("MSDD_FAST_CPU_BF16", "1")
    z = torch.randn(1, 4, 8, 16, generator=torch.Generator().manual_seed(0))  # not square
    save_latents(Latents(z, ["x"]), tmp_path / "z.safetensors")
    args = ("decode", tmp_path / "z.safetensors", "-o", tmp_path / "x.png")
    assert run(*args, "--dtype", "bfloat16")[0] == 0
    image, exact = pixels(tmp_path / "x.png"), to_uint8(tiny.decode(z)[0])
    assert image.shape == exact.shape == (3, 64, 128)
    assert 0 < (image.float() - exact.float()).abs().mean() < 10


@pytest.fixture(scope="module")
def large(tiny, tmp_path_factory):
    """Latents of three images of 256 x 192 px, and the limit that leaves only tiles for two of them together."""
    z = torch.randn(3, 4, 32, 24, generator=torch.Generator().manual_seed(0))
    path = tmp_path_factory.mktemp("large") / "z.safetensors"
    save_latents(Latents(z, ["a", "b", "c"]), path)
    engine = accelerate(tiny, dtype=torch.float32, steps=1, batch_sizes=2)
    request = engine.request(z[:2])
    untiled = [request._replace(way=way) for way in ways_of(engine.program, request) if not way.tile]
    limit = min(engine._budget.needed(r, 1) for r in untiled) - 1
    limited = accelerate(tiny, dtype=torch.float32, steps=1, batch_sizes=2, max_memory=limit)
    assert limited.plan(request).way.tile == 128 and not limited.plan(request.with_batch(1)).way.tile
    whole, tiled = engine.decode(z, range(3)), engine.decode(z, range(3), tile=128)
    return SimpleNamespace(path=path, limit=limit, whole=whole, tiled=tiled)


def decode_large(run, large, out, *more):
    return run("decode", large.path, "-o", out, "--steps", 1, "--dtype", "float32", "--batch-size", 2, *more)


def test_tiles_of_a_memory_limit_are_part_of_the_options(run, large, tmp_path):
    """Every batch has the same tiles, also the last, which by itself would need none."""
    limit = ("--max-memory", large.limit)
    code, out, err = decode_large(run, large, tmp_path, *limit)
    assert (code, err) == (0, "") and "decoding in tiles of 128 px, which changes the pictures" in out
    record = json.loads((tmp_path / "decode.json").read_text())
    assert record["tile"] == 128
    for name, tiled, whole in zip("abc", large.tiled, large.whole, strict=True):
        assert nearly_equal(pixels(tmp_path / f"{name}.png"), to_uint8(tiled))
        assert not nearly_equal(pixels(tmp_path / f"{name}.png"), to_uint8(whole))
    (tmp_path / "b.png").unlink()
    code, _, err = decode_large(run, large, tmp_path)
    assert code == 1 and "a.png was decoded with tile 128 instead of None; give --overwrite" in err
    assert decode_large(run, large, tmp_path, *limit)[1].count("2 of 3 are already there") == 1
    assert nearly_equal(pixels(tmp_path / "b.png"), to_uint8(large.tiled[1]))


def test_a_memory_limit_that_changes_nothing_is_not_recorded(run, large, tmp_path):
    assert decode_large(run, large, tmp_path, "--max-memory", "16GiB")[0] == 0
    assert nearly_equal(pixels(tmp_path / "c.png"), to_uint8(large.whole[2]))
    code, out, _ = decode_large(run, large, tmp_path)
    assert code == 0 and "3 of 3 are already there" in out


def test_memory_that_runs_out_below_the_limit(run, large, tmp_path, monkeypatch):
    """The engine would go on in tiles: such pictures are not put among others."""
    usual = FastDecoder._decode_chunk

    def small(self, inputs, request, *rest):
        if not request.way.tile:
            raise MemoryError
        return usual(self, inputs, request, *rest)

    monkeypatch.setattr(FastDecoder, "_decode_chunk", small)
    code, _, err = decode_large(run, large, tmp_path, "--max-memory", "16GiB")
    assert code == 1 and "memory ran out below --max-memory, and tiles of 128 px would change the rest" in err
    assert [p.name for p in tmp_path.iterdir()] == ["decode.json"]


def test_a_memory_limit_that_nothing_fits_in(run, large, tmp_path):
    code, _, err = decode_large(run, large, tmp_path / "out", "--max-memory", "1kB")
    assert code == 1 and "max_memory must be at least " in err and "got 1000" in err
    assert not (tmp_path / "out").exists()


def test_reconstruct(run, tiny, photos, tmp_path):
    code, out, err = run("reconstruct", photos, "-o", tmp_path / "r.png", "--seed", 4)
    assert (code, err) == (0, "")
    x = inputs(photos)
    y = tiny.decode(tiny.encode(x), seed=4)
    picture = pixels(tmp_path / "r.png")
    assert picture.shape == (3, 2 * SIZE + 4, 2 * SIZE + 4)  # original and result, two rows
    assert nearly_equal(picture[:, SIZE + 4 :, -SIZE:], to_uint8(y[1]))
    assert f"a.png: {psnr(y, x)[0]:.2f} dB" in out


def test_eval(run, tiny, photos, tmp_path):
    code, _, err = run("eval", photos, "--json", tmp_path / "r.json", "--batch-size", 1)
    assert (code, err) == (0, "")
    report = json.loads((tmp_path / "r.json").read_text())
    x = inputs(photos)
    y = torch.cat([tiny.decode(tiny.encode(x[i : i + 1]), seed=i) for i in range(2)])
    assert report["mean"]["psnr_db"] == pytest.approx(psnr(y, x).mean().item(), abs=0.01)
    assert (report["count"], report["steps_per_scale"], report["cfg_scale"]) == (2, 2, 1.0)


def test_guidance_is_refused(run, photos, tmp_path):
    for command, option in (("reconstruct", "-o"), ("eval", "--json")):
        code, _, err = run(
            command, photos, option, tmp_path / ("x.png" if option == "-o" else "x.json"), "--cfg-scale", 2
        )
        assert code == 1 and "cfg_scale must be 1 for an SSDD tokenizer (it has no null context), got 2.0" in err
    assert not list(tmp_path.iterdir())


def test_demo(run, tmp_path):
    pytest.importorskip("skimage", reason="its photographs")
    code, out, err = run("demo", "--out", tmp_path / "d.png")
    assert (code, err) == (0, "") and "plain PyTorch, float32" in out and "engine, float32" in out
    assert (tmp_path / "d.png").is_file()


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """A file as the authors' code would write it; XS is the smallest size with 32 groups."""
    path = tmp_path_factory.mktemp("theirs") / "xs.safetensors"
    Tokenizer.from_config(SSDD_PRESETS["ssdd-xs-f8c4"]).export_released(path)
    return path


def test_convert_there_and_back(run, theirs, tmp_path):
    code, out, err = run("convert", theirs, tmp_path / "ours", "--steps", 1, "--image-size", 128, named=False)
    assert (code, err) == (0, "") and "39.2 M parameters" in out
    tok = Tokenizer.from_pretrained(tmp_path / "ours")
    assert tok.config.sampling.steps == 1 and tok.config.image_size == 128
    code, _, err = run("convert", tmp_path / "ours", tmp_path / "back.safetensors", "--export", named=False)
    assert (code, err) == (0, "")
    a, b = load_file(theirs), load_file(tmp_path / "back.safetensors")
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("a.safetensors", "o", "--num-stages", "3"), "--num-stages means nothing for the family ssdd, got 3"),
        (("a.pt", "o", "--steps", "3"), "--steps means nothing for the family msdd, got 3"),
        (("a.pt", "o", "--family", "ssdd", "--weights", "ema"), "--weights means nothing for the family ssdd, got ema"),
        (("a", "o.safetensors", "--export", "--steps", "1"), "--steps means nothing with --export, got 1"),
        (("a", "o", "--export"), "output must end in .safetensors, got o"),
        (("a.safetensors", "o"), "a.safetensors is missing"),
        (("tiny", "o.safetensors", "--export"), "tokenizer must be of the family ssdd or pid, got msdd"),
    ],
)
def test_convert_mistakes(run, tmp_path, monkeypatch, args, message):
    monkeypatch.chdir(tmp_path)
    if args[0] == "tiny":
        Tokenizer.from_config("tiny").save_pretrained("tiny")
    code, _, err = run("convert", *args, named=False)
    assert code == 1 and message in err and err.count("\n") == 1
