"""Bulk work on Ray itself, on this machine: workers, kills, addresses."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import msdd_fast
from msdd_fast.io.json_files import read_json_lines
from msdd_fast.io.latents import Latents, save_latents
from tests.commands.bulk.conftest import COUNT, digests
from tests.metrics.packages import package, write_squeezenet

pytestmark = pytest.mark.slow
pytest.importorskip("ray.data", reason="needs Ray Data (the extra [ray])")

IMAGES, SHARD = 240, 4
ONE = ("--workers", 1, "--cpus-per-worker", 1)
TWO = ("--workers", 2, "--cpus-per-worker", 1)


@pytest.fixture(scope="module")
def many(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("many") / "z.safetensors"
    z = torch.randn(IMAGES, *tiny.config.latent_shape, generator=torch.Generator().manual_seed(0))
    save_latents(Latents(z, [f"{i:04d}" for i in range(IMAGES)]), path)
    return path


@pytest.fixture
def start(checkpoint):
    """Starts a command in a process of its own."""
    processes = []

    def start(command, *args, **environment):
        words = [sys.executable, "-m", "msdd_fast", command, *map(str, args), "--checkpoint", checkpoint, "--ray"]
        process = subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment}
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.communicate()


def finish(process, code=0):
    out, err = process.communicate(timeout=280)
    assert process.returncode == code, (out, err)
    return out, err


def lines_of(out, at_least, process):
    """The manifest, as soon as it has so many lines."""
    for _ in range(3000):
        lines = read_json_lines(out / "manifest.jsonl")
        if len(lines) >= at_least:
            return lines
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    raise AssertionError("nothing came")


def check_whole(out, whole):
    """Every unit once, and the bytes of a run that nobody disturbed."""
    lines = read_json_lines(out / "manifest.jsonl")
    assert sorted(m["first"] for m in lines) == list(range(0, IMAGES, SHARD))
    assert digests(out, ".tar") == digests(whole, ".tar") and len(digests(out, ".tar")) == IMAGES // SHARD
    assert not [p.name for p in out.iterdir() if p.name.startswith(".")]
    return lines


def decode(many, out):
    return ("decode", many, "-o", out, "--batch-size", SHARD, "--shards", "--shard-size", SHARD)


@pytest.fixture(scope="module")
def whole(many, checkpoint, tmp_path_factory):
    """The result of one worker."""
    out = tmp_path_factory.mktemp("whole")
    words = [*map(str, decode(many, out)), *map(str, ONE), "--checkpoint", checkpoint, "--ray"]
    subprocess.run([sys.executable, "-m", "msdd_fast", *words], check=True, timeout=280)
    assert len({m["worker"] for m in check_whole(out, out)}) == 1
    return out


def test_two_workers_give_the_bytes_of_one_and_a_killed_one_is_replaced(start, many, whole, tmp_path):
    process = start(*decode(many, tmp_path), *TWO)
    victim = lines_of(tmp_path, 3, process)[-1]["worker"]
    os.kill(int(victim.rsplit(":", 1)[1]), signal.SIGKILL)
    out, _ = finish(process)
    assert f"wrote {IMAGES} pictures" in out
    lines = check_whole(tmp_path, whole)
    workers = {m["worker"] for m in lines}
    assert victim in workers and len(workers) >= 2
    print("killed", victim, "workers", workers)


def test_a_killed_driver_goes_on_where_it_was(start, many, whole, tmp_path):
    process = start(*decode(many, tmp_path), *TWO)
    before = lines_of(tmp_path, 3, process)
    process.kill()
    process.communicate()
    time.sleep(2)  # its workers notice
    there = {p.name: p.stat().st_mtime_ns for p in tmp_path.glob("*.tar")}
    assert len(before) <= len(there) < IMAGES // SHARD
    kept = {m["output"] for m in read_json_lines(tmp_path / "manifest.jsonl")}
    finish(start(*decode(many, tmp_path), *TWO))
    check_whole(tmp_path, whole)
    assert all((tmp_path / name).stat().st_mtime_ns == there[name] for name in kept)  # not decoded again


def test_encode_with_two_workers(start, checkpoint, photo_shards, tmp_path):
    args = ("encode", photo_shards, "--shard-size", 2, "--batch-size", 2)
    for name, workers in (("one", ONE), ("two", TWO)):
        out, err = finish(start(*args, "-o", tmp_path / name, *workers))
        assert "10 x 16 x 32" in out and "1 of 11 images could not be read" in err
    assert digests(tmp_path / "one", ".safetensors") == digests(tmp_path / "two", ".safetensors")


# In every process: whoever would publish the part GATED says so in the folder GATE and waits until it may go on.
SITECUSTOMIZE = """
import os, time

publish = os.replace

def replace(source, target, **options):
    gate = os.environ["GATE"]
    if str(target).endswith(os.environ["GATED"]) and not os.path.exists(f"{gate}/open"):
        open(f"{gate}/reached-{os.getpid()}", "w").close()
        while not os.path.exists(f"{gate}/open"):
            time.sleep(0.02)
    publish(source, target, **options)

os.replace = replace
"""


def reached(gate, process):
    """The process that waits at the gate."""
    while not (found := list(gate.glob("reached-*"))):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    return int(found[0].name.removeprefix("reached-"))


def test_eval_with_two_workers_of_which_one_is_killed(start, photos, tmp_path):
    """The report of one worker, to the last digit: nothing is lost and nothing counted twice."""
    package("skimage", "scikit-image")
    package("torch_fidelity", "torch-fidelity")
    write_squeezenet(tmp_path / "squeezenet.pth")
    words = ("eval", photos, "--batch-size", 1, "--seed", 3, "--features", f"squeezenet={tmp_path}/squeezenet.pth")
    one, two = ((*words, "--out", tmp_path / n, "--json", tmp_path / f"{n}.json") for n in ("one", "two"))
    finish(start(*one, *ONE))
    (tmp_path / "gate").mkdir()
    (tmp_path / "gate" / "sitecustomize.py").write_text(SITECUSTOMIZE)
    gate = {"PYTHONPATH": str(tmp_path / "gate"), "GATE": str(tmp_path / "gate"), "GATED": "000004.safetensors"}
    process = start(*two, *TWO, **gate)
    victim = reached(tmp_path / "gate", process)
    hidden = [p for p in (tmp_path / "two").glob(".*.safetensors") if p.stat().st_size]
    assert hidden and not (tmp_path / "two" / "000004.safetensors").exists()  # measured, but not there yet
    os.kill(victim, signal.SIGKILL)
    (tmp_path / "gate" / "open").touch()
    _, err = finish(process)
    assert "1 of 11 images could not be read" in err
    assert (tmp_path / "two.json").read_text() == (tmp_path / "one.json").read_text()
    lines = read_json_lines(tmp_path / "two" / "manifest.jsonl")
    assert sorted(m["first"] for m in lines) == list(range(COUNT))
    assert victim not in {int(m["worker"].rsplit(":", 1)[1]) for m in lines if m["first"] == 4}
    assert not [p.name for p in (tmp_path / "two").iterdir() if p.name.startswith(".")]


def test_a_terminated_run_says_so_and_goes_on_later(start, photos, tmp_path):
    (tmp_path / "gate").mkdir()
    (tmp_path / "gate" / "sitecustomize.py").write_text(SITECUSTOMIZE)
    gate = {"PYTHONPATH": str(tmp_path / "gate"), "GATE": str(tmp_path / "gate"), "GATED": "000001.safetensors"}
    words = ("encode", photos, "-o", tmp_path / "z", "--shard-size", 4, "--batch-size", 2)
    process = start(*words, *ONE, **gate)
    reached(tmp_path / "gate", process)
    process.terminate()
    out, err = finish(process, 143)
    assert (out, err.splitlines()[-1]) == ("", "msdd-fast: terminated")
    assert not (tmp_path / "z" / "000001.safetensors").exists()
    finish(start(*words, *ONE))
    assert len(digests(tmp_path / "z", ".safetensors")) == 3
    assert not [p.name for p in (tmp_path / "z").iterdir() if p.name.startswith(".")]


def test_the_error_of_a_worker_is_one_line(start, many, tiny, tmp_path):
    z = torch.zeros(8, *tiny.config.latent_shape)
    z[5] = float("inf")
    save_latents(Latents(z, [f"{i}" for i in range(8)]), tmp_path / "z.safetensors")
    _, err = finish(start(*decode(tmp_path / "z.safetensors", tmp_path / "out"), *ONE), 1)
    errors = [line for line in err.splitlines() if line.startswith("msdd-fast: error")]
    assert errors == ["msdd-fast: error: latents must be finite, got NaN or Inf in item 5 (5)"]
    assert "Traceback" not in err


def test_classes_for_map_batches(checkpoint, tiny):
    """The images of a pipeline that a user writes."""
    import ray

    from msdd_fast.integrations.ray import Decoder, Encoder

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        rng = np.random.default_rng(0)
        size = tiny.config.image_size
        images = rng.integers(0, 256, (10, size, size, 3), dtype=np.uint8)
        rows = ray.data.from_items([{"index": i, "image": x} for i, x in enumerate(images)], override_num_blocks=5)
        pool = ray.data.ActorPoolStrategy(size=1)
        arguments = {"checkpoint": checkpoint, "batch_size": 2}
        common = {"fn_constructor_kwargs": arguments, "batch_size": 2, "compute": pool, "num_cpus": 1}
        found = rows.map_batches(Encoder, **common).map_batches(Decoder, **common).take_all()
    finally:
        ray.shutdown()
    assert sorted(r["index"] for r in found) == list(range(10))
    engine = msdd_fast.accelerate(tiny, batch_sizes=(1,))
    for row in found:
        x = torch.from_numpy(images[row["index"]]).permute(2, 0, 1).float().div(127.5).sub(1.0)
        expected = engine.decode(tiny.encode(x[None]), row["index"], out_dtype=torch.uint8)[0].permute(1, 2, 0)
        assert np.abs(row["image"].astype(int) - expected.numpy()).max() <= 1
