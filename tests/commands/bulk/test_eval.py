"""``eval`` with --ray, with the workers in this process: the report of ``eval``, in whatever order parts are measured.

test_on_ray.py does the same on Ray itself.
"""

import json

import pytest

from msdd_fast.commands.evaluation.options import CROPS
from msdd_fast.commands.evaluation.run import RECORD
from msdd_fast.io.json_files import read_json_lines
from tests.commands.bulk.conftest import COUNT, killed
from tests.metrics.packages import package, write_squeezenet

pytest.importorskip("skimage", reason="needs the extra [eval]")

PROTOCOL = ("--batch-size", 2, "--steps", 1, "--seed", 5, "--ssim", "ssim", "ssim_authors", "--pixels", "uint8")
PARTS = -(-COUNT // 2)  # of one batch each
WHERE = ("processes", "device", "threads", "torch")


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """Options for figures of whole sets, which are merged from parts."""
    package("torch_fidelity", "torch-fidelity")
    path = tmp_path_factory.mktemp("squeezenet") / "squeezenet.pth"
    write_squeezenet(path)
    return ("--features", f"squeezenet={path}")


def report_of(path):
    return json.loads(path.read_text())


def test_the_report_is_that_of_eval(run, ray, photos, networks, tmp_path):
    plain = run("eval", photos, *PROTOCOL, *networks, "--json", tmp_path / "plain.json")
    code, out, err = run("eval", photos, *PROTOCOL, *networks, "--json", tmp_path / "ray.json", "--ray")
    assert code == plain[0] == 0 and sorted(ray.done) == list(range(PARTS)) != ray.done
    assert out == "".join(line for line in plain[1].splitlines(True) if not line.startswith("processes"))
    assert err == plain[2] and "1 of 11 images could not be read" in err
    ours, theirs = report_of(tmp_path / "ray.json"), report_of(tmp_path / "plain.json")
    assert {"frechet_squeezenet", "kid_squeezenet", "ssim_authors"} <= {*ours["mean"]} and ours["seed"] == 5
    assert theirs.pop("processes") == 1 and ours == theirs  # with every image's figures, to the last digit
    run("eval", photos, *PROTOCOL, *networks, "--json", tmp_path / "again.json", "--ray")
    assert (tmp_path / "again.json").read_text() == (tmp_path / "ray.json").read_text()  # in another order


def test_without_ray_and_on_it_a_run_goes_on_where_the_other_stopped(run, ray, photos, tmp_path):
    out = tmp_path / "o"
    run("eval", photos, *PROTOCOL, "--out", out, "--json", tmp_path / "plain.json")
    (out / "000001.safetensors").unlink()
    (out / "000003.safetensors").write_bytes(b"half of it")
    code, said, _ = run("eval", photos, *PROTOCOL, "--out", out, "--json", tmp_path / "ray.json", "--ray")
    assert code == 0 and said.startswith(f"{PARTS - 2} of {PARTS} parts were already there\n")
    assert sorted(ray.done) == [1, 3] and len(read_json_lines(out / "manifest.jsonl")) == PARTS
    (out / "000002.safetensors").unlink()
    run("eval", photos, *PROTOCOL, "--out", out, "--json", tmp_path / "again.json")
    plain, on_ray, again = (report_of(tmp_path / f"{name}.json") for name in ("plain", "ray", "again"))
    assert {**on_ray, "processes": 1} == plain == again and len(ray.done) == 2


@pytest.mark.parametrize("survive", [1, PARTS - 1])
def test_a_killed_run_goes_on_and_counts_nothing_twice(run, ray, photos, tmp_path, survive):
    words = ("eval", photos, *PROTOCOL, "--ray", "--json", tmp_path / "r.json")
    run(*words)
    whole, out = (tmp_path / "r.json").read_text(), tmp_path / "o"
    ray.survive, ray.done = survive, []
    killed(run, *words, "--out", out)
    assert len(ray.done) == survive == len(read_json_lines(out / "manifest.jsonl"))
    # A worker that died between writing its part and saying so: the part is there, its line is not.
    ray.survive = None
    lines = (out / "manifest.jsonl").read_text().splitlines(True)
    (out / "manifest.jsonl").write_text("".join(lines[:-1]) + '{"first": 0, "cou')
    (out / f".{'0' * 32}.safetensors").touch()  # what it was writing
    assert run(*words, "--out", out)[0] == 0
    assert sorted(ray.done) == list(range(PARTS))  # each once: a part that is there is not measured again
    assert (tmp_path / "r.json").read_text() == whole and report_of(tmp_path / "r.json")["count"] == COUNT - 1
    assert sorted(p.name for p in out.iterdir()) == sorted(
        [RECORD, "manifest.jsonl", *(f"{i:06d}.safetensors" for i in range(PARTS))]
    )
    assert len(read_json_lines(out / "manifest.jsonl")) == PARTS
    assert run(*words, "--out", out, "--overwrite")[0] == 0
    assert len(ray.done) == 2 * PARTS and (tmp_path / "r.json").read_text() == whole


def test_images_in_shards_are_those_of_the_folder(run, ray, photos, photo_shards, tmp_path):
    run("eval", photos, *PROTOCOL, "--json", tmp_path / "files.json", "--ray")
    assert run("eval", photo_shards, *PROTOCOL, "--count", 5, "--json", tmp_path / "shards.json", "--ray")[0] == 0
    files, shards = report_of(tmp_path / "files.json"), report_of(tmp_path / "shards.json")
    assert [*shards["images"]] == [f"000000/{i:02d}" for i in (0, 2, 4, 6, 8)]
    assert [*shards["images"].values()] == [*files["images"].values()][:5]


def test_two_folders(run, ray, photos, tmp_path):
    run("encode", photos, "-o", tmp_path / "z.safetensors")
    run("decode", tmp_path / "z.safetensors", "-o", tmp_path / "d", "--steps", 1)
    (tmp_path / "d" / "p1" / "03.png").write_bytes(b"no image, as its original")
    words = ("eval", photos, "--reconstructions", tmp_path / "d", "--crop", CROPS[0], "--batch-size", 2)
    for name, more in (("plain", ()), ("ray", ("--ray",))):
        assert run(*words, "--json", tmp_path / f"{name}.json", *more)[0] == 0
    plain, on_ray = (report_of(tmp_path / f"{name}.json") for name in ("plain", "ray"))
    assert plain.pop("processes") == 1 and plain == on_ray and on_ray["count"] == COUNT - 1


def test_the_engine(run, ray, photos, tmp_path):
    words = ("eval", photos, *PROTOCOL, "--decoder", "engine", "--dtype", "bfloat16")
    for name, more in (("plain", ()), ("ray", ("--ray",))):
        assert run(*words, "--json", tmp_path / f"{name}.json", *more)[0] == 0
    plain, on_ray = (report_of(tmp_path / f"{name}.json") for name in ("plain", "ray"))
    assert plain.pop("processes") == 1 and plain == on_ray


def test_wrong_arguments_are_one_line_and_write_nothing(fails, ray, photos, tmp_path, monkeypatch):
    out = tmp_path / "out"
    for says, *args in (
        ("--throughput is not for --ray", "--out", out, "--throughput", 1, "--ray"),
        ("--ray ADDRESS needs --out", "--ray", "auto"),
        ("--workers needs --ray", "--workers", 2),
        ("--overwrite needs --out", "--overwrite", "--ray"),
        ("seed must be", "--out", out, "--seed", 2**63 - 2, "--ray"),
        ("LPIPS weights not found", "--out", out, "--lpips-vgg", "/no/file", "--ray"),
    ):
        assert says in fails("eval", photos, *args)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "--ray starts its workers itself" in fails("eval", photos, "--out", out, "--ray")
    assert not out.exists() and not ray.runs


def test_other_options_are_refused(run, fails, ray, photos, tmp_path):
    run("eval", photos, *PROTOCOL, "--out", tmp_path / "o", "--ray")
    assert "other seed" in fails("eval", photos, *PROTOCOL, "--seed", 6, "--out", tmp_path / "o", "--ray")


def test_no_image_can_be_read(fails, ray, tmp_path):
    (tmp_path / "p").mkdir()
    for name in "ab":
        (tmp_path / "p" / f"{name}.png").write_bytes(b"not an image")
    assert "none of 2 images can be read" in fails("eval", tmp_path / "p", "--ray")
