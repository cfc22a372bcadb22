"""``encode`` and ``decode`` with --ray, with the workers in this process, in any order and killed at any time.

test_on_ray.py does the same on Ray itself.
"""

import contextlib
import json
import os
import signal
import socket
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tqdm import tqdm

from msdd_fast.commands.bulk import options as bulk_options
from msdd_fast.commands.bulk import run as bulk_run
from msdd_fast.commands.bulk.workers import Unit, Worker
from msdd_fast.errors import BackendUnavailableError, InputError
from msdd_fast.io.json_files import read_json_lines
from msdd_fast.io.latents import Latents, load_latents, save_latents
from tests.commands.bulk.conftest import COUNT, digests, killed

DECODE = ("--batch-size", 4, "--steps", 1, "--seed", 5)


def test_decode_gives_the_files_of_decode(run, ray, z_file, tmp_path, monkeypatch):
    monkeypatch.setattr("msdd_fast.commands.bulk.decode.BATCHES", 1)
    assert run("decode", z_file, "-o", tmp_path / "plain", *DECODE)[0] == 0
    code, out, _ = run("decode", z_file, "-o", tmp_path / "ray", *DECODE, "--ray")
    assert code == 0 and f"wrote {COUNT} pictures" in out and sorted(ray.done) == [0, 1, 2]
    assert digests(tmp_path / "ray", ".png") == digests(tmp_path / "plain", ".png")
    # Their records agree, so that each goes on with what the other left.
    (tmp_path / "ray" / "a" / "03.png").unlink()
    (tmp_path / "plain" / "a" / "03.png").unlink()
    assert "10 of 11 are already there" in run("decode", z_file, "-o", tmp_path / "ray", *DECODE)[1]
    assert run("decode", z_file, "-o", tmp_path / "plain", *DECODE, "--ray")[0] == 0
    assert digests(tmp_path / "ray", ".png") == digests(tmp_path / "plain", ".png")


def test_decode_to_shards(run, ray, z_file, latents, tmp_path):
    run("decode", z_file, "-o", tmp_path / "plain", *DECODE)
    out = tmp_path / "shards"
    assert run("decode", z_file, "-o", out, *DECODE, "--ray", "--shards", "--shard-size", 4)[0] == 0
    found = {}
    for i in range(3):
        with tarfile.open(out / f"{i:06d}.tar") as tar:
            found |= {m.name: tar.extractfile(m).read() for m in tar}
    assert list(found) == [f"{name}.png" for name in latents.names]
    for name, data in found.items():
        assert data == (tmp_path / "plain" / name).read_bytes()
    lines = read_json_lines(out / "manifest.jsonl")
    assert sorted((m["first"], m["count"], m["output"]) for m in lines) == [
        (0, 4, "000000.tar"),
        (4, 4, "000001.tar"),
        (8, 3, "000002.tar"),
    ]
    assert all(m["worker"] and m["seconds"] >= 0 for m in lines)


@pytest.mark.parametrize("survive", [0, 1, 2])
def test_a_killed_decode_goes_on(run, ray, z_file, tmp_path, survive):
    args = ("decode", z_file, *DECODE, "--ray", "--shards", "--shard-size", 4)
    run(*args, "-o", tmp_path / "whole")
    out = tmp_path / "out"
    ray.survive, ray.done = survive, []
    killed(run, *args, "-o", out)
    manifest = out / "manifest.jsonl"
    assert len(ray.done) == survive and out.exists() == (survive > 0)
    assert survive == (len(read_json_lines(manifest)) if out.exists() else 0)
    out.mkdir(exist_ok=True)  # without a result there is none
    with open(manifest, "a") as f:
        f.write('{"first": 0, "cou')  # a line that the kill cut off
    ray.survive = None
    (out / f".{'0' * 32}.tar").touch()  # what a killed worker was writing
    (out / ".mine.tar").touch()
    assert run(*args, "-o", out)[0] == 0
    assert [p.name for p in out.iterdir() if p.name.startswith(".")] == [".mine.tar"]
    (out / ".mine.tar").unlink()
    assert sorted(ray.done) == [0, 1, 2]  # none twice
    assert digests(out, ".tar") == digests(tmp_path / "whole", ".tar")
    assert len(read_json_lines(out / "manifest.jsonl")) == 3
    again = run(*args, "-o", out)[1]
    assert again == f"{COUNT} of {COUNT} are already there\nwrote 0 pictures to {out}\n" and len(ray.done) == 3
    (out / "000001.tar").unlink()
    run(*args, "-o", out)
    assert ray.done[3:] == [1] and digests(out, ".tar") == digests(tmp_path / "whole", ".tar")
    assert len(read_json_lines(out / "manifest.jsonl")) == 3


def test_progress_is_silent_with_quiet(run, ray, z_file, tmp_path, monkeypatch):
    bars = []

    class Bar(tqdm):
        def __init__(self, *args, **options):
            bars.append(options["disable"])
            super().__init__(*args, **options)

    monkeypatch.setattr(bulk_run, "tqdm", Bar)
    run("decode", z_file, "-o", tmp_path / "loud", *DECODE, "--ray")
    assert run("decode", z_file, "-o", tmp_path / "quiet", *DECODE, "--ray", "--quiet") == (0, "", "")
    assert bars == [None, True]


def test_encode_gives_the_shards_of_encode(run, ray, photos, tmp_path):
    size = ("--shard-size", 4, "--batch-size", 2)
    plain = run("encode", photos, "-o", tmp_path / "plain", *size)
    found = run("encode", photos, "-o", tmp_path / "ray", *size, "--ray")
    assert found[0] == plain[0] == 0 and found[2] == plain[2] and "1 of 11 images could not be read" in found[2]
    assert found[1] == plain[1].replace("plain", "ray") == f"wrote {tmp_path}/ray/: 10 x 16 x 32\n"
    assert digests(tmp_path / "ray", ".safetensors", ".json") == digests(tmp_path / "plain", ".safetensors", ".json")
    assert run("encode", photos, "-o", tmp_path / "x", *size, "--ray", "--strict")[0] == 1
    # Each goes on with what the other left, and passes over the same image.
    for folder, ray_too in ((tmp_path / "plain", ("--ray",)), (tmp_path / "ray", ())):
        (folder / "000001.safetensors").unlink()
        ray.done.clear()
        again = run("encode", photos, "-o", folder, *size, *ray_too)
        assert again[0] == 0 and "1 of 11 images could not be read" in again[2]
        assert ray.done == [1] * len(ray_too)
    assert digests(tmp_path / "ray", ".safetensors") == digests(tmp_path / "plain", ".safetensors")


def test_encode_reads_shards(run, ray, photos, photo_shards, tmp_path):
    run("encode", photos, "-o", tmp_path / "files", "--shard-size", 4, "--batch-size", 2)
    code, _, err = run("encode", photo_shards, "-o", tmp_path / "z", "--shard-size", 4, "--batch-size", 2, "--ray")
    assert code == 0 and "000001.tar at byte" in err
    for i in range(3):
        mine, theirs = (load_latents(tmp_path / d / f"{i:06d}.safetensors") for d in ("z", "files"))
        assert torch.equal(mine.z, theirs.z)
    assert load_latents(tmp_path / "z" / "000000.safetensors").names[0] == "000000/00"


def test_overwrite_does_everything_again(run, ray, z_file, photos, tmp_path):
    for args in (("decode", z_file, *DECODE), ("encode", photos, "--shard-size", 4)):
        ray.done = []
        for more in ((), ("--overwrite",)):
            assert run(*args, "-o", tmp_path / args[0], "--ray", *more)[0] == 0
        done = len(ray.done)
        assert done and sorted(ray.done) == sorted([*range(done // 2)] * 2)


def test_one_bad_image_ends_the_run_with_one_line_and_what_is_done_stays(run, fails, ray, latents, tmp_path):
    ray.runs = 3  # the order of the units that follows: the bad one is the second
    z = latents.z.clone()
    z[6, 0, 0] = float("nan")
    save_latents(Latents(z, latents.names), tmp_path / "z.safetensors")
    args = (
        "decode",
        tmp_path / "z.safetensors",
        "-o",
        tmp_path / "out",
        *DECODE,
        "--ray",
        "--shards",
        "--shard-size",
        4,
    )
    assert "latents must be finite, got NaN or Inf in item 6 (a/06)" in fails(*args)
    there = {p.name for p in (tmp_path / "out").iterdir()} - {"decode.json", "manifest.jsonl"}
    assert "000001.tar" not in there and len(there) == len(read_json_lines(tmp_path / "out" / "manifest.jsonl")) > 0
    assert not [p for p in there if not p.endswith(".tar")]


@pytest.mark.parametrize("there", [False, True])
def test_a_run_that_fails_before_its_first_result_leaves_nothing(
    run, fails, ray, z_file, photos, latents, tmp_path, there
):
    bad = Latents(torch.full_like(latents.z, float("nan")), latents.names)
    save_latents(bad, tmp_path / "z.safetensors")
    out = tmp_path / "out"
    if there:
        out.mkdir()
        (out / "mine.txt").write_text("x")
    for shards in ((), ("--shards",)):
        assert "latents must be finite" in fails("decode", tmp_path / "z.safetensors", "-o", out, "--ray", *shards)
        assert [p.name for p in out.iterdir()] == ["mine.txt"] if there else not out.exists()
    ray.survive = 0
    for command, source in (("decode", z_file), ("encode", photos)):
        killed(run, command, source, "-o", out, "--ray")
        assert [p.name for p in out.iterdir()] == ["mine.txt"] if there else not out.exists()


def test_a_refusal_leaves_the_record_of_another_run(run, fails, ray, photos, tmp_path):
    out = tmp_path / "e"
    run("encode", photos, "-o", out, "--shard-size", 4, "--ray")
    for name in ("000000", "000001"):  # what is left has no name that the next run would write
        (out / f"{name}.safetensors").unlink()
    before = digests(out, ".json", ".jsonl", ".safetensors")
    assert "other shard_size" in fails("encode", photos, "-o", out, "--shard-size", 6, "--ray")
    assert digests(out, ".json", ".jsonl", ".safetensors") == before and "encode.json" in before


def test_other_options_are_refused(run, fails, ray, z_file, photos, tmp_path):
    out = tmp_path / "d"
    run("decode", z_file, "-o", out, *DECODE, "--ray", "--shards", "--shard-size", 4)
    assert "shard_size" in fails("decode", z_file, "-o", out, *DECODE, "--ray", "--shards", "--shard-size", 5)
    assert "seed" in fails("decode", z_file, "-o", out, *DECODE[:-1], 6, "--ray", "--shards", "--shard-size", 4)
    run("encode", photos, "-o", tmp_path / "e", "--shard-size", 4, "--ray")
    assert "other shard_size" in fails("encode", photos, "-o", tmp_path / "e", "--shard-size", 5, "--ray")


def test_wrong_arguments_are_one_line_and_write_nothing(run, fails, ray, z_file, photos, tmp_path):
    out = tmp_path / "out"
    for says, *args in (
        ("--out must be a folder with --ray", "decode", z_file, "-o", tmp_path / "x.png", "--ray"),
        ("--out must be a folder with --ray", "encode", photos, "-o", tmp_path / "x.safetensors", "--ray"),
        ("--shard-size needs --shards", "decode", z_file, "-o", out, "--ray", "--shard-size", 3),
        ("--shard-size needs --ray", "decode", z_file, "-o", out, "--shard-size", 3),
        ("--shards needs --ray", "decode", z_file, "-o", out, "--shards"),
        ("--workers needs --ray", "encode", photos, "-o", out, "--workers", 2),
        ("--ray takes an address, got the path", "decode", "-o", out, z_file, "--ray", photos),
        ("cfg_scale must be", "decode", z_file, "-o", out, "--ray", "--cfg-scale", -1),
        ("steps must be", "decode", z_file, "-o", out, "--ray", "--steps", 0),
        ("seed must be", "decode", z_file, "-o", out, "--ray", "--seed", 2**63 - 2),
    ):
        assert says in fails(*args)
    save_file({"latents": torch.zeros(0, 16, 32)}, tmp_path / "none.safetensors")
    assert "holds no latents" in fails("decode", tmp_path / "none.safetensors", "-o", out, "--ray")
    save_file({"latents": torch.zeros(2, 8, 32)}, tmp_path / "other.safetensors")
    assert "z must have shape (B, 16, 32)" in fails("decode", tmp_path / "other.safetensors", "-o", out, "--ray")
    assert not out.exists() and not ray.runs


@pytest.mark.parametrize("error", [None, InputError("what came of it")])
def test_a_worker_that_should_end_publishes_nothing_more(error):
    """Ray's handler of SIGTERM ends a worker by an exception, which C code may drop: not a result, not an error."""

    class Losing(Worker):
        def do(self, unit):
            with contextlib.suppress(SystemExit):
                os.kill(os.getpid(), signal.SIGTERM)
            if error is not None:
                raise error
            return {}

    def leave(number, frame):
        raise SystemExit(1)

    rows = {"unit": np.array([0]), "work": np.array([json.dumps(Unit(0, 1, "x", ["a"], []))], dtype=object)}
    before = signal.signal(signal.SIGTERM, leave)
    try:
        with pytest.raises(SystemExit):
            Losing()(rows)
        assert signal.getsignal(signal.SIGTERM) is leave
    finally:
        signal.signal(signal.SIGTERM, before)


def test_without_ray_it_says_what_to_install(fails, z_file, tmp_path, monkeypatch):
    monkeypatch.setattr(bulk_options, "has_ray", lambda: False)
    assert "pip install 'msdd-fast[ray]'" in fails("decode", z_file, "-o", tmp_path / "out", "--ray")


def test_more_workers_than_this_machine_has_cores_are_refused():
    workers, options = bulk_run._workers, bulk_options.RayOptions
    assert workers(options("local", None, 0, None), {"CPU": 8.0}) == (2, {"num_cpus": 4})
    assert workers(options("local", None, 0, None), {"CPU": 2.0}) == (1, {"num_cpus": 2})
    assert workers(options("local", 4, 2, None), {"CPU": 8.0}) == (4, {"num_cpus": 2})
    assert workers(options("auto", 50, 2, None), {"CPU": 8.0}) == (50, {"num_cpus": 2})  # the cluster may grow
    assert workers(options("auto", None, 0, None), {"CPU": 64.0, "GPU": 8.0}) == (8, {"num_gpus": 1, "num_cpus": 1})
    assert workers(options("auto", None, 0, "cpu"), {"CPU": 64.0, "GPU": 8.0}) == (16, {"num_cpus": 4})
    for given in (("local", 3, 1, None), ("local", 1, 3, None), ("auto", 1, 3, None)):
        with pytest.raises(Exception, match="cores, Ray has 2"):
            workers(options(*given), {"CPU": 2.0})


def test_an_address_where_nobody_listens_is_said_at_once():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        for address in (f"127.0.0.1:{port}", f"ray://127.0.0.1:{port}", "local", "auto"):
            bulk_run._require_reachable(address)
    for address in (f"127.0.0.1:{port}", f"ray://127.0.0.1:{port}"):
        with pytest.raises(BackendUnavailableError, match=f"--ray {address}: Connection refused"):
            bulk_run._require_reachable(address)


def test_pictures_of_the_command_are_what_the_engine_gives(run, ray, z_file, latents, tiny, tmp_path):
    import msdd_fast

    run("decode", z_file, "-o", tmp_path / "out", *DECODE, "--ray")
    engine = msdd_fast.accelerate(tiny, batch_sizes=(1,), steps=1)
    expected = engine.decode(latents.z[5:6], 5 + 5, out_dtype=torch.uint8)[0].permute(1, 2, 0).numpy()
    got = np.asarray(Image.open(tmp_path / "out" / "a" / "05.png"))
    assert np.abs(got.astype(int) - expected).max() <= 1
