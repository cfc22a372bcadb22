"""A small checkpoint, images and latents for bulk work."""

import hashlib
import io
import json
import random
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from msdd_fast.commands import main as cli
from msdd_fast.commands.bulk import options as bulk_options
from msdd_fast.commands.bulk import run as bulk_run
from msdd_fast.io.latents import Latents, save_latents
from tests.perturbed import perturbed

COUNT = 11


@pytest.fixture(autouse=True)
def _with_one_thread(one_thread):
    """Many small decodes."""


@pytest.fixture(scope="session")
def tiny():
    return perturbed()


@pytest.fixture(scope="session")
def checkpoint(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("bulk") / "tiny"
    tiny.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """COUNT images, of which the fourth cannot be read."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for i in range(COUNT):
        image = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize((70 + i, 64))
        (folder / f"p{i % 2}").mkdir(exist_ok=True)
        image.save(folder / f"p{i % 2}" / f"{i:02d}.png")
    (folder / "p1" / "03.png").write_bytes(b"not an image")
    return folder


@pytest.fixture(scope="session")
def photo_shards(photos, tmp_path_factory):
    """The same images in two WebDataset shards."""
    folder = tmp_path_factory.mktemp("shards")
    files = sorted(photos.rglob("*.png"))
    for i, part in enumerate((files[:5], files[5:])):
        with tarfile.open(folder / f"{i:06d}.tar", "w") as tar:
            for file in part:
                tar.add(file, f"{file.stem}.png")
                add(tar, f"{file.stem}.json", b"{}")
    return folder


@pytest.fixture(scope="session")
def latents(tiny):
    z = torch.randn(COUNT, *tiny.config.latent_shape, generator=torch.Generator().manual_seed(0))
    return Latents(z, [f"a/{i:02d}" for i in range(COUNT)])


@pytest.fixture(scope="session")
def z_file(latents, tmp_path_factory):
    path = tmp_path_factory.mktemp("z") / "z.safetensors"
    save_latents(latents, path)
    return path


class Killed(BaseException):
    """The driver is gone."""


class InProcess:
    """In place of Ray: units in random order; the driver is killed after ``survive`` of them."""

    def __init__(self):
        self.survive, self.done, self.runs = None, [], 0

    def __call__(self, worker, arguments, todo, options):
        self.runs += 1
        made = worker(**arguments, device="cpu", threads=None)
        order = list(todo)
        random.Random(self.runs).shuffle(order)
        for n, row in enumerate(order):
            if n == self.survive:
                raise Killed
            rows = {name: np.array([value], dtype=object) for name, value in row.items()}
            self.done.append(row["unit"])
            yield json.loads(made(rows)["result"][0])


@pytest.fixture
def ray(monkeypatch):
    fake = InProcess()
    monkeypatch.setattr(bulk_run, "_on_ray", fake)
    monkeypatch.setattr(bulk_options, "has_ray", lambda: True)
    return fake


@pytest.fixture
def run(checkpoint, capsys):
    def run(command, *args):
        code = cli.main([command, *map(str, args), "--checkpoint", checkpoint, "--device", "cpu"])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def fails(run):
    def fails(*args):
        code, out, err = run(*args)
        assert code == 1 and out == "" and err.startswith("msdd-fast: error: ") and err.count("\n") == 1, (out, err)
        return err.removeprefix("msdd-fast: error: ").strip()

    return fails


def killed(run, *args):
    with pytest.raises(Killed):
        run(*args)


def add(tar, name, data):
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def digests(folder, *suffixes):
    """SHA-256 of every file with one of the suffixes, by its path in the folder."""
    found = sorted(p for p in Path(folder).rglob("*") if p.suffix in suffixes)
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in found}
