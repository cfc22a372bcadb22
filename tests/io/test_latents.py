"""Latents files: round trips, names, damaged and hostile files."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from msdd_fast.errors import InputError
from msdd_fast.io import safetensors as safetensors_io
from msdd_fast.io.latents import Latents, concatenate, load_latents, save_latents, unique_names


@pytest.fixture
def path(tmp_path):
    return tmp_path / "z.safetensors"


def write(path, z, names=None):
    save_file({"latents": z}, path, None if names is None else {"names": names})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip(tmp_path, dtype):
    z = torch.randn(3, 4, 2).to(dtype).transpose(1, 2)  # not contiguous
    names = ["a", "folder/b.c", "ünïcode 1"]
    path = tmp_path / "new" / "folder" / "z.safetensors"
    save_latents(Latents(z, names), path)
    loaded = load_latents(path)
    assert loaded.z.dtype == dtype and torch.equal(loaded.z, z)
    assert loaded.names == names
    assert os.listdir(path.parent) == ["z.safetensors"]


def test_empty(path):
    save_latents(Latents(torch.zeros(0, 4, 2), []), path)
    assert load_latents(path).z.shape == (0, 4, 2)


def test_names_are_optional(path):
    write(path, torch.zeros(2, 4, 2))
    assert load_latents(path).names == ["000000", "000001"]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["a.png", "b.jpg"], ["a", "b"]),
        (["a.png", "sub/a.png"], ["a", "sub/a"]),
        (["a.png", "a.jpg", "b.png"], ["a.png", "a.jpg", "b"]),
        (["a.png", "a.jpg", "a.png.png"], ["a.png", "a.jpg", "a.png.png"]),
    ],
)
def test_unique_names(files, expected):
    root = Path("/data")
    assert unique_names([root / f for f in files], root) == expected


def test_unique_names_of_many_files():
    root = Path("/data")
    names = unique_names([root / f"{i}.png" for i in range(20_000)], root)  # minutes if quadratic
    assert len(set(names)) == 20_000


def test_names_that_could_not_be_read_again_are_not_written(path):
    for names in (["a"], ["a", "a"], ["a", "../b"], ["a", "b\\c"]):
        with pytest.raises(InputError, match="names must"):
            save_latents(Latents(torch.zeros(2, 4, 2), names), path)
    assert not os.listdir(path.parent)


def test_concatenate():
    a, b = Latents(torch.zeros(2, 4, 2), ["a", "b"]), Latents(torch.ones(1, 4, 2), ["c"])
    both = concatenate([a, b])
    assert both.names == ["a", "b", "c"] and torch.equal(both.z, torch.cat([a.z, b.z]))
    with pytest.raises(InputError, match=r"must agree in shape, got \(4, 2\) and \(5, 2\)"):
        concatenate([a, Latents(torch.zeros(1, 5, 2), ["c"])])


def test_failed_write_leaves_the_old_file(path, monkeypatch):
    old = Latents(torch.zeros(1, 4, 2), ["old"])
    save_latents(old, path)

    def fail(tensors, target, metadata):
        target.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors_io, "save_file", fail)
    with pytest.raises(InputError, match=r"cannot write .*z\.safetensors: No space left on device"):
        save_latents(Latents(torch.ones(1, 4, 2), ["new"]), path)
    assert os.listdir(path.parent) == ["z.safetensors"]
    assert load_latents(path).names == ["old"]


@pytest.mark.parametrize("place", ["file/z.safetensors", "/proc/msdd/z.safetensors"])
def test_unwritable(tmp_path, place):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match=r"cannot write .*: \w"):
        save_latents(Latents(torch.zeros(1, 4, 2), ["a"]), tmp_path / place)
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("keep", [0, 7, 40, -1])
def test_truncated(path, keep):
    save_latents(Latents(torch.zeros(2, 4, 2), ["a", "b"]), path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match=r"z\.safetensors is damaged or not a safetensors file"):
        load_latents(path)


def test_foreign(path):
    with pytest.raises(InputError, match=r"latents file .*z\.safetensors does not exist"):
        load_latents(path)
    path.write_text("hello")
    with pytest.raises(InputError, match="is damaged or not a safetensors file"):
        load_latents(path)
    save_file({"weight": torch.zeros(1), "bias": torch.zeros(1)}, path)
    with pytest.raises(InputError, match=r"must hold a tensor 'latents', got (weight, bias|bias, weight)"):
        load_latents(path)
    save_file({"latents": torch.zeros(4, 2)}, path)
    with pytest.raises(InputError, match=r"latents must be \(N, tokens, dim\) or .*, got \(4, 2\)"):
        load_latents(path)
    with pytest.raises(InputError, match="is damaged or not a safetensors file"):
        load_latents(path.parent)


@pytest.mark.parametrize(
    "name", ["../x", "/etc/x", "a/../../x", "a\\x", "a\0x", "./x", "a//x", "x/"], ids=lambda name: repr(name)
)
def test_hostile_names(path, name):
    write(path, torch.zeros(1, 4, 2), json.dumps([name]))
    with pytest.raises(InputError, match="names must be plain paths inside the output folder"):
        load_latents(path)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("[", "list of names is not valid JSON"),
        ('{"a": 1}', "names must be 2 non-empty strings, got dict"),
        ('["a"]', "names must be 2 non-empty strings, got 1"),
        ('["a", 3]', "names must be 2 non-empty strings"),
        ('["a", ""]', "names must be 2 non-empty strings"),
        ('["a", "a"]', "names must be unique, got 'a' twice"),
    ],
)
def test_bad_names(path, names, message):
    write(path, torch.zeros(2, 4, 2), names)
    with pytest.raises(InputError, match=message):
        load_latents(path)
