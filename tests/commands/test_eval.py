"""eval: protocols, resuming, several processes, two folders. table: its three forms."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from msdd_fast import accelerate
from msdd_fast.commands import main as cli
from msdd_fast.commands.evaluation import tables
from msdd_fast.commands.evaluation.published import PUBLISHED
from msdd_fast.commands.evaluation.run import part_size
from msdd_fast.commands.evaluation.suite import Suite
from msdd_fast.io.images import adm_crop, center_crop, load_image, save_image, to_image, to_tensor
from msdd_fast.metrics.distances import kernel_distance
from msdd_fast.metrics.features import SqueezeNetFeatures
from msdd_fast.metrics.image import psnr, ssim
from msdd_fast.ops._patches import to_uint8
from tests.metrics.packages import package, write_backbone, write_inception, write_squeezenet
from tests.perturbed import perturbed
from tests.training.launch import finish, start

SIZE = 64
COUNT = 7
pytest.importorskip("skimage", reason="needs the extra [eval]")


@pytest.fixture(scope="module")
def tiny():
    return perturbed()


@pytest.fixture(scope="module")
def checkpoint(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("eval") / "tiny"
    tiny.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for i in range(COUNT):
        coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        coarse.resize((150 + i, 140), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def squeezenet(tmp_path_factory):
    path = tmp_path_factory.mktemp("squeezenet") / "squeezenet.pth"
    write_squeezenet(path)
    return path


@pytest.fixture
def run(checkpoint, capsys):
    """Runs eval with the tiny checkpoint; returns exit code, stdout, stderr."""

    def run(*args):
        code = cli.main(["eval", *map(str, args), "--checkpoint", str(checkpoint), "--device", "cpu"])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def report_of(path):
    return json.loads(path.read_text())


def same_figures(a, b):
    """All that two reports say of the images, to the last bit, but for eigenvalues by libraries with threads."""
    for key in ("images", "details", "count", "unreadable"):
        assert a[key] == b[key], key
    assert a["mean"] == pytest.approx(b["mean"], rel=1e-9)
    assert {k: v for k, v in a["mean"].items() if "frechet" not in k} == {
        k: v for k, v in b["mean"].items() if "frechet" not in k
    }


def originals(photos, crop=center_crop):
    return torch.stack([to_tensor(crop(load_image(photos / f"{i}.png"), SIZE)) for i in range(COUNT)])


def reconstructions(tiny, x, seed=0):
    return torch.cat(
        [
            tiny.decode(tiny.encode(x[i : i + 2]), [seed + k for k in range(i, min(i + 2, COUNT))], 1)
            for i in (0, 2, 4, 6)
        ]
    )


# --- the protocol


def test_a_whole_protocol(run, tiny, photos, squeezenet, tmp_path):
    """Everything that the figures depend on is in the report, and they are those of the functions."""
    package("torch_fidelity", "torch-fidelity")
    out = tmp_path / "r.json"
    code, text, err = run(
        *(photos, "--json", out, "--set", "sevens", "--split", "val", "--name", "mine", "--crop", "adm"),
        *("--resize", "lanczos", "--pixels", "uint8", "--ssim", "ssim", "ssim_authors"),
        *("--features", f"squeezenet={squeezenet}", "--batch-size", 2, "--seed", 5, "--steps", 1, "--cfg-scale", 1),
    )
    assert (code, err) == (0, "")
    r = report_of(out)
    expected = {
        **{"set": "sevens", "split": "val", "name": "mine", "count": COUNT, "unreadable": 0, "mode": "reconstruct"},
        **{"crop_name": "adm", "resize": "lanczos", "pixels": "uint8", "image_size": SIZE, "batch_size": 2, "seed": 5},
        **{"steps_per_scale": 1, "cfg_scale": 1.0, "decoder": "eager", "dtype": "float32", "computed_in": "float32"},
        **{"latent_shape": [16, 32], "scales": 4, "processes": 1, "torch": torch.__version__},
    }
    assert {key: r[key] for key in expected} == expected
    assert r["crop"].startswith("ADM's: ") and "antialiased lanczos" in r["crop"] and r["crop"].endswith("64 px")
    assert len(r["model"]) == 16 and r["device"] and r["folder"] == str(photos)
    assert r["weights"]["frechet_squeezenet"]["network"] == "squeezenet-1.1-caffe"
    assert all(len(w["sha256"]) == 64 and w["file"] == "squeezenet.pth" for w in r["weights"].values())
    assert "fid" not in r["mean"] and "kid" not in r["mean"]

    x = originals(photos, lambda image, size: adm_crop(image, size, Image.Resampling.LANCZOS))
    y = reconstructions(tiny, x, seed=5)
    bytes_x, bytes_y = to_uint8(x), to_uint8(y)
    rounded = bytes_y.float() / 127.5 - 1
    values = list(r["images"].values())
    assert list(r["images"]) == [str(photos / f"{i}.png") for i in range(COUNT)]
    assert [v["psnr_db"] for v in values] == pytest.approx(psnr(rounded, x).tolist(), abs=0.02)
    assert [v["ssim"] for v in values] == pytest.approx(ssim(rounded, x).tolist(), abs=2e-3)
    assert [v["ssim_authors"] for v in values] == pytest.approx(ssim(rounded, x, "ssim_authors").tolist(), abs=2e-3)
    for name in ("psnr_db", "ssim", "ssim_authors"):
        assert r["mean"][name] == pytest.approx(np.mean([v[name] for v in values]))
        assert f"{r['mean'][name]:.4f}" in text
    network = SqueezeNetFeatures(squeezenet)
    features = network(bytes_x), network(bytes_y)
    assert r["mean"]["frechet_squeezenet"] > 0
    assert r["mean"]["kid_squeezenet"] == pytest.approx(kernel_distance(*features).mean, rel=0.05, abs=1e-4)
    assert r["details"]["frechet_squeezenet"] == {"features": 512, "images": COUNT}
    assert r["details"]["kid_squeezenet"]["subset_size"] == COUNT


def test_crops(photos):
    """ADM's as its evaluation does it, step by step; a named filter replaces BOX in the centre crop."""
    image = load_image(photos / "3.png")  # 153 x 140
    halved = image.resize((76, 70), Image.Resampling.BOX)
    resized = halved.resize((round(76 * 64 / 70), 64), Image.Resampling.BICUBIC)
    left = (resized.width - 64) // 2
    assert np.array_equal(adm_crop(image, 64), resized.crop((left, 0, left + 64, 64)))
    assert np.array_equal(adm_crop(image, 140), image.crop((6, 0, 146, 140)))
    square = image.crop((6, 0, 146, 140))
    assert np.array_equal(center_crop(image, 70), square.resize((70, 70), Image.Resampling.BOX))
    bilinear = square.resize((70, 70), Image.Resampling.BILINEAR)
    assert np.array_equal(center_crop(image, 70, Image.Resampling.BILINEAR), bilinear)


def test_count_and_engine(run, tiny, photos, tmp_path):
    out = tmp_path / "r.json"
    args = ("--count", 4, "--batch-size", 2, "--seed", 3, "--json", out)
    assert run(photos, *args, "--decoder", "engine", "--dtype", "float32", "--throughput", 0)[0] == 0
    r = report_of(out)
    assert r["count"] == 4 and (r["decoder"], r["computed_in"]) == ("engine", "float32")
    x = originals(photos)[:4]
    engine = accelerate(tiny, dtype=torch.float32, batch_sizes=2)
    y = torch.cat([engine.decode(tiny.encode(x[i : i + 2]), [3 + i, 4 + i]) for i in (0, 2)])
    assert [v["psnr_db"] for v in r["images"].values()] == pytest.approx(psnr(y, x).tolist(), abs=1e-3)
    ours, authors = r["throughput"]["ours"], r["throughput"]["authors"]
    assert ours["decode_images_per_second"] > 0 and ours["encode_decode_images_per_second"] > 0
    assert authors["encode_decode_images_per_second"] > 0 and ours["batch_size"] == authors["batch_size"] == 2
    assert ours["how"] != authors["how"]
    assert run(photos, *args, "--dtype", "bfloat16")[0] == 0
    autocast = report_of(out)
    assert (autocast["decoder"], autocast["computed_in"]) == ("eager", "bfloat16")
    assert autocast["mean"]["psnr_db"] != r["mean"]["psnr_db"]
    assert autocast["mean"]["psnr_db"] == pytest.approx(r["mean"]["psnr_db"], abs=0.1)


# --- parts, resuming, processes


def test_part_sizes():
    assert part_size(24, 8) == 8 and part_size(1, 8) == 8  # one batch each while there are few
    assert part_size(50_000, 32) == 256 and part_size(50_000, 1) == 256
    assert part_size(50_000, 500) == 500 * 2 or part_size(50_000, 500) == 500
    assert all(part_size(n, b) % b == 0 for n in (1, 63, 64, 65, 5000) for b in (1, 3, 300))


def test_resumed_and_shared_runs_give_the_same(run, checkpoint, photos, squeezenet, tmp_path, monkeypatch):
    """A run from the start, one that was interrupted twice, and one of two processes agree to the last bit."""
    package("torch_fidelity", "torch-fidelity")
    threads = torch.get_num_threads()
    options = ("--batch-size", 2, "--steps", 1, "--features", f"squeezenet={squeezenet}")
    shutil.copytree(photos, tmp_path / "p")
    (tmp_path / "p" / "2.5.png").write_text("no image")
    whole, parts = tmp_path / "whole.json", tmp_path / "parts"
    common = (tmp_path / "p", *options)
    two = start(
        2,
        [
            "eval",
            *common,
            "--checkpoint",
            checkpoint,
            "--device",
            "cpu",
            "--out",
            tmp_path / "two",
            "--json",
            tmp_path / "two.json",
        ],
    )
    torch.set_num_threads(1)
    try:
        assert run(*common, "--json", whole)[0] == 0
        assert run(*common, "--out", parts)[0] == 0
        names = sorted(p.name for p in parts.iterdir())
        assert names == [*(f"{i:06d}.safetensors" for i in range(4)), "eval.json"]
        (parts / names[1]).unlink()
        (parts / names[2]).write_bytes((parts / names[2]).read_bytes()[:-9])  # as a machine that lost its power left it
        kept = {n: (parts / n).stat().st_mtime_ns for n in (names[0], names[3])}
        code, out, err = run(*common, "--out", parts, "--json", tmp_path / "resumed.json")
        assert code == 0 and out.startswith("2 of 4 parts are already there\n")
        assert "1 of 8 images could not be read and were passed over" in err and "2.5.png is not a readable" in err
        assert kept == {n: (parts / n).stat().st_mtime_ns for n in kept}
    finally:
        torch.set_num_threads(threads)
    results = finish(two)
    assert [code for code, _ in results] == [0, 0], results
    assert results[0][1].count("could not be read and were passed over") == 1 and results[1][1] == ""
    same_figures(report_of(tmp_path / "resumed.json"), report_of(whole))
    same_figures(report_of(tmp_path / "two.json"), report_of(whole))
    assert report_of(tmp_path / "two.json")["processes"] == 2
    # Other options in the same folder.
    code, _, err = run(*common, "--out", parts, "--seed", 1)
    assert code == 1 and "parts holds figures of another run (other seed): use --overwrite, or another folder" in err
    (tmp_path / "p" / "2.5.png").unlink()
    code, _, err = run(*common, "--out", parts)
    assert code == 1 and "(other images)" in err
    assert run(*common, "--out", parts, "--overwrite", "--json", tmp_path / "o.json")[0] == 0
    assert report_of(tmp_path / "o.json")["count"] == COUNT


def test_several_processes_need_a_folder(photos, run, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run(photos)[2] == "msdd-fast: error: several processes need --out, a folder that they share\n"


@pytest.mark.slow
def test_an_error_in_one_process_ends_all(checkpoint, photos, tmp_path):
    """Said once, with the exit code of an error in each."""
    (tmp_path / "w.pth").write_text("no weights")
    arguments = ["eval", photos, "--checkpoint", checkpoint, "--device", "cpu", "--out", tmp_path / "o"]
    results = finish(start(2, [*arguments, "--vgg19", tmp_path / "w.pth"]))
    assert [code for code, _ in results] == [1, 1]
    assert "w.pth is damaged or not a PyTorch file" in results[0][1] and results[1][1] == ""


# --- two folders


@pytest.fixture(scope="module")
def decoded(tiny, photos, tmp_path_factory):
    """Reconstructions as another program may have written them."""
    folder = tmp_path_factory.mktemp("decoded")
    for i, y in enumerate(reconstructions(tiny, originals(photos))):
        save_image(to_image(y), folder / f"{i}.png")
    return folder


def test_two_folders_are_the_reconstruction(run, photos, decoded, tmp_path):
    """Written to PNGs and compared, reconstructions have the figures of `eval --pixels uint8`."""
    options = ("--ssim", "ssim", "ssim_authors", "--batch-size", 2)
    assert run(photos, "--pixels", "uint8", "--steps", 1, *options, "--json", tmp_path / "a.json")[0] == 0
    compared = ("--reconstructions", decoded, "--crop", "center", *options, "--json", tmp_path / "b.json")
    assert run(photos, *compared)[0] == 0
    a, b = report_of(tmp_path / "a.json"), report_of(tmp_path / "b.json")
    assert (b["mode"], b["reconstructions"], b["name"]) == ("compare", str(decoded), decoded.name)
    assert "checkpoint" not in b and "seed" not in b
    for name, value in a["mean"].items():
        assert b["mean"][name] == pytest.approx(value, rel=2e-3), name


@pytest.mark.slow  # eigenvalues of 2048 x 2048 matrices; tests/metrics has the proof on fewer features
def test_fid_of_two_folders_is_torch_fidelitys(run, photos, decoded, tmp_path):
    fidelity = package("torch_fidelity", "torch-fidelity")
    write_inception(tmp_path / "inception.pth")
    for i in range(COUNT):
        save_image(center_crop(load_image(photos / f"{i}.png"), SIZE), tmp_path / "a" / f"{i}.png")
    features = f"inception={tmp_path / 'inception.pth'}"
    out = tmp_path / "r.json"
    code, _, err = run(tmp_path / "a", "--reconstructions", decoded, "--features", features, "--json", out)
    assert (code, err) == (0, "")
    expected = fidelity.calculate_metrics(
        input1=str(tmp_path / "a"),
        input2=str(decoded),
        cuda=False,
        fid=True,
        kid=True,
        kid_subset_size=COUNT,
        feature_extractor_weights_path=str(tmp_path / "inception.pth"),
        cache=False,
        save_cpu_ram=True,
        verbose=False,
    )
    mean = report_of(out)["mean"]
    # Seven images leave most eigenvalues at rounding's size.
    assert mean["fid"] == pytest.approx(expected["frechet_inception_distance"], rel=1e-4, abs=1e-5)
    assert mean["kid"] == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-5, abs=1e-6)


def test_folders_that_do_not_match(run, photos, decoded, tmp_path):
    out = ("--json", tmp_path / "r.json")

    def message(*args):
        code, _, err = run(*args, *out)
        assert code == 1 and err.count("\n") == 1
        return err

    assert "0.png has 150 x 140 pixels, its reconstruction 64 x 64: give --crop" in message(
        photos, "--reconstructions", decoded
    )
    shutil.copytree(decoded, tmp_path / "d")
    (tmp_path / "d" / "4.png").unlink()
    assert "must have an image for each of" in message(photos, "--reconstructions", tmp_path / "d")
    shutil.copy(decoded / "4.png", tmp_path / "d" / "4.png")
    Image.open(decoded / "3.png").save(tmp_path / "d" / "3.bmp")
    assert "must have one image of a name, got 3.bmp and 3.png" in message(photos, "--reconstructions", tmp_path / "d")
    (tmp_path / "d" / "3.bmp").unlink()
    Image.open(decoded / "3.png").crop((0, 0, 64, 60)).save(tmp_path / "d" / "3.png")
    cropped = ("--reconstructions", tmp_path / "d", "--crop", "center")
    assert "--crop center needs square reconstructions, got 64 x 60 pixels" in message(photos, *cropped)
    assert not (tmp_path / "r.json").exists()
    (tmp_path / "d" / "3.png").write_text("broken")
    code, _, err = run(photos, *cropped, *out)
    assert code == 0 and "1 of 7 images could not be read and were passed over" in err
    assert report_of(tmp_path / "r.json")["count"] == COUNT - 1


def test_images_of_different_sizes(tmp_path):
    """Each is measured with its partner."""
    x = [torch.zeros(3, 16, 16), torch.zeros(3, 20, 12)]
    y = [torch.full((3, 16, 16), 0.2), torch.full((3, 20, 12), 0.4)]
    assert Suite().measure(y, x)["psnr_db"].tolist() == pytest.approx([20.0, 13.9794], abs=1e-3)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--overwrite",), "--overwrite needs --out"),
        (("--crop", "none"), "--crop none needs --reconstructions"),
        (("--throughput", "nan"), "--throughput must be a number of seconds, got nan"),
        (("--features", "dino=x"), "--features must be NETWORK=FILE with a network of inception, vgg19, squeezenet"),
        (("--features", "vgg19"), "--features must be NETWORK=FILE"),
        (("--count", 1, "--features", "squeezenet=/no/file"), "SqueezeNet features not found"),
        (("--vgg19", "/no/file"), "VGG-19 features not found: expected the VGG-19 features vgg_normalised_conv3_1.pth"),
        (("--lpips-vgg", "/no/file"), "LPIPS weights not found: expected torchvision's VGG-16, https://"),
        (("--reconstructions", "/no/folder"), "/no/folder is neither a file nor a folder"),
    ],
)
def test_bad_options(run, photos, args, message):
    code, out, err = run(photos, *args)
    assert (code, out) == (1, "") and err.count("\n") == 1 and message in err


def test_one_image_is_no_set(run, photos, squeezenet):
    package("torch_fidelity", "torch-fidelity")
    _, _, err = run(photos, "--count", 1, "--features", f"squeezenet={squeezenet}")
    assert err == "msdd-fast: error: --features needs at least 2 images, got 1\n"


@pytest.mark.parametrize(
    ("missing", "message"), [("skimage.metrics", "scikit-image"), ("torch_fidelity.metric_fid", "fidelity")]
)
def test_missing_packages_are_said_before_the_work(run, photos, squeezenet, monkeypatch, missing, message):
    package("torch_fidelity", "torch-fidelity")
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.setattr("msdd_fast.Tokenizer.from_pretrained", None)
    code, _, err = run(photos, "--features", f"squeezenet={squeezenet}")
    assert code == 1 and err.count("\n") == 1 and message in err and "pip install 'msdd-fast[eval]'" in err


def test_json_on_standard_output_and_silence(run, photos, tmp_path):
    words = (photos, "--count", 2, "--steps", 1)
    code, out, err = run(*words, "--json", "-")
    assert code == 0 and json.loads(out)["count"] == 2 and "psnr_db" in err
    assert run(*words, "--quiet", "--json", tmp_path / "r.json", "--out", tmp_path / "o") == (0, "", "")
    assert report_of(tmp_path / "r.json")["count"] == 2
    assert run(*words, "--quiet", "--out", tmp_path / "o") == (0, "", "")  # which says nothing of parts that are there


def test_lpips(run, photos, tmp_path):
    package("lpips", "lpips")
    write_backbone(tmp_path / "alex.pth", "alex")
    out = tmp_path / "r.json"
    assert run(photos, "--count", 2, "--steps", 1, "--lpips-alex", tmp_path / "alex.pth", "--json", out)[0] == 0
    r = report_of(out)
    assert r["mean"]["lpips_alex"] > 0 and r["weights"]["lpips_alex"]["network"] == "lpips 0.1, alex"


# --- tables


@pytest.fixture
def reports(tmp_path):
    first = {
        **{"name": "nano_a", "set": "Kodak", "count": 24, "mode": "reconstruct", "image_size": 128, "scales": 4},
        **{"latent_shape": [128, 32], "steps_per_scale": 1, "cfg_scale": 1.0, "seed": 0, "crop": "center & 100 %"},
        "mean": {"psnr_db": 25.654, "ssim": 0.7538, "vgg19_distance": 0.3054, "frechet_vgg19": 60.06},
        "throughput": {
            "ours": {"decode_images_per_second": 12.34},
            "authors": {"encode_decode_images_per_second": 5.6},
        },
    }
    second = {
        **{"name": "sd", "set": "Kodak", "count": 24, "mode": "compare", "latent_shape": [4, 32, 32]},
        "mean": {"psnr_db": 30.0, "ssim": 0.9, "fid": 0.6149},
    }
    for name, content in (("a", first), ("b", second)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    return [str(tmp_path / f"{name}.json") for name in "ab"]


@pytest.fixture
def table(capsys):
    def table(*args):
        code = cli.main(["table", *map(str, args)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return table


def rows_of(markdown):
    lines = [line for line in markdown.splitlines() if line.startswith("| ")]
    header, *body = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return [dict(zip(header, line, strict=True)) for line in body]


@pytest.mark.parametrize("form", [1, 2, 3])
def test_table_forms(table, reports, form):
    code, out, err = table(*reports, "--form", form, "--format", "markdown")
    assert (code, err) == (0, "")
    a, b, *published = rows_of(out)
    own = {1: {"px": "128", "tokens": "128"}, 2: {"scales": "4", "steps per scale": "1"}}
    own[3] = {**own[2], "CFG": "1"}
    shown = {"model": "nano_a", "set": "Kodak, 24", **own[form], "rFID": "-", "PSNR (dB)": "25.65", "SSIM": "0.754"}
    shown |= {
        "VGG-19 distance": "0.305",
        "Frechet (VGG-19)": "60.1",
        "img/s, decode": "12.34",
        "img/s, authors' way": "5.6",
    }
    assert a == shown
    assert (b["rFID"], b["PSNR (dB)"], b["VGG-19 distance"]) == ("0.61", "30.00", "-")
    if form == 1:
        assert b["tokens"] == "1024"
    assert "- sd: mode compare\n" in out
    assert len(published) == len(PUBLISHED) and all(row["model"].endswith(" (published)") for row in published)
    four = next(row for row in published if row["model"] == "MSDD, 4 scales (published)")
    assert four["img/s, authors' way"] == "87.16" and four["img/s, decode"] == four["rFID"] == four["set"] == "-"
    assert next(row for row in published if row["model"] == "SSDD (published)")["rFID"] == "0.50"
    assert "- nano_a: mode reconstruct; crop center & 100 %; seed 0" in out and "arXiv 2603.19570" in out


def test_table_as_text_and_latex(table, reports, tmp_path):
    lines = table(*reports, "--no-published")[1].splitlines()
    assert lines[0].split()[:2] == ["model", "set"] and lines[1].startswith("nano_a") and len(lines) == 6
    assert table(*reports, "--format", "latex", "-o", tmp_path / "t.tex") == (0, "", "")
    tex = (tmp_path / "t.tex").read_text()
    assert r"nano\_a & Kodak, 24 & 128 & 128 & -- & 25.65 & 0.754 &" in tex
    assert tex.count(r"\\") == 3 + len(PUBLISHED) and r"\begin{tabular}{llrr" in tex
    columns = {line.count(" & ") for line in tex.splitlines() if line.endswith(r"\\")}
    assert len(columns) == 1 and tex.split(r"\begin{tabular}{")[1].index("}") == columns.pop() + 1
    assert "% nano_a: mode reconstruct; crop center & 100 %" in tex
    assert tables.escape(r"a\b~{50 %}_#$^&") == (
        r"a\textbackslash{}b\textasciitilde{}\{50 \%\}\_\#\$\textasciicircum{}\&"
    )


def test_table_of_other_published_rows(table, reports, tmp_path):
    row = {"name": "theirs", "source": "a paper", "mean": {"fid": 0.3, "lpips_vgg": 0.1}, "latent_shape": [256, 16]}
    (tmp_path / "p.json").write_text(json.dumps([row]))
    out = table(reports[0], "--published", tmp_path / "p.json", "--no-published", "--format", "markdown")[1]
    ours, theirs = rows_of(out)
    assert ours["LPIPS (VGG)"] == "-"
    assert (theirs["model"], theirs["rFID"], theirs["tokens"]) == ("theirs (published)", "0.30", "256")
    # A report cannot pass itself off as published, nor published rows as measured.
    forged = {**report_of(Path(reports[0])), "source": "x", "authors": 99.0, "throughput": {}}
    (tmp_path / "f.json").write_text(json.dumps(forged))
    out = table(tmp_path / "f.json", "--no-published", "--format", "markdown")[1]
    assert rows_of(out)[0]["model"] == "nano_a" and "99" not in out


def test_table_of_odd_names(table, tmp_path):
    """None breaks out of its cell, its line or its comment."""
    (tmp_path / "r.json").write_text(json.dumps({"name": "a|b\nc", "set": "x\ny", "count": 1, "mean": {}}))
    for form in ("markdown", "latex", "text"):
        out = table(tmp_path / "r.json", "--no-published", "--format", form)[1]
        assert "\nc" not in out and "\ny" not in out
    out = table(tmp_path / "r.json", "--no-published", "--format", "markdown")[1]
    assert "| a\\|b c | x y, 1 | - |" in out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "is not a report of msdd-fast eval: it has no mean"),
        ("{}", "is not a report of msdd-fast eval: it has no mean"),
        ('{"mean": {"fid": "low"}}', "is not a report of msdd-fast eval"),
        ("{", "is not a JSON file"),
        ('{"mean": {}, "scales": "four"}', "scales must be a number, got 'four'"),
        ('{"mean": {}, "latent_shape": 4}', "latent_shape must be a list of numbers, got 4"),
        ('{"mean": {}, "throughput": 4}', "throughput must hold figures by the way they were measured, got 4"),
        ('{"mean": {}, "throughput": {"ours": {"decode_images_per_second": "x"}}}', "must be a number, got 'x'"),
    ],
)
def test_files_that_are_no_reports(table, tmp_path, content, message):
    (tmp_path / "x.json").write_text(content)
    code, out, err = table(tmp_path / "x.json")
    assert (code, out) == (1, "") and err.startswith("msdd-fast: error: ") and err.count("\n") == 1 and message in err


def test_bad_published_rows(table, reports, tmp_path):
    for content in ("{}", '[{"name": "x"}]', '[{"name": "x", "source": "y", "mean": 3}]'):
        (tmp_path / "p.json").write_text(content)
        code, _, err = table(reports[0], "--published", tmp_path / "p.json")
        assert code == 1 and "p.json must be a list of objects with name, source and mean" in err
    assert "no.json does not exist" in table(tmp_path / "no.json")[2]
