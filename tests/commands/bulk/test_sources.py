"""What bulk work finds, and that it is the same data as without Ray."""

import itertools
import json
import tarfile

import numpy as np
import pytest
import torch

from msdd_fast.commands.bulk.sources import LatentSource, Piece, list_images, list_latents, load_pieces, load_ref
from msdd_fast.commands.record import digest
from msdd_fast.errors import InputError
from msdd_fast.io.images import find_image_files, load_image
from msdd_fast.io.latents import Latents, save_latents, unique_names
from tests.commands.bulk.conftest import COUNT, add, npy


def test_images_of_a_folder_are_those_of_encode(photos):
    refs, names = list_images(photos)
    files = find_image_files(photos)
    assert [r.path for r in refs] == [str(f) for f in files]
    assert names == unique_names(files, photos)


def test_images_of_shards_are_read_in_place(photos, photo_shards):
    refs, names = list_images(photo_shards)
    files = sorted(photos.rglob("*.png"))
    assert names == [f"{i // 5 if i < 5 else 1:06d}/{f.stem}" for i, f in enumerate(files)]
    assert (np.asarray(load_ref(refs[0])) == np.asarray(load_image(files[0]))).all()
    assert [r.read() for r in refs] == [f.read_bytes() for f in files]
    assert list_images(photo_shards / "000001.tar") == (refs[5:], names[5:])
    bad = next(r for r, f in zip(refs, files, strict=True) if f.name == "03.png")
    with pytest.raises(InputError, match=r"000001.tar at byte \d+ is not a readable image"):
        load_ref(bad)


def test_latents_of_files_and_any_part_of_them(latents, tmp_path):
    for name, part in (("b", slice(0, 4)), ("c", slice(4, 5)), ("d", slice(5, COUNT))):
        save_latents(Latents(latents.z[part], latents.names[part]), tmp_path / f"{name}.safetensors")
    source = list_latents(tmp_path, is_one_set=True)
    assert source.names == latents.names
    assert list_latents(tmp_path, is_one_set=False).names[4] == "c/a/04"
    for first, last in ((0, COUNT), (0, 1), (3, 6), (4, 5), (10, 11)):
        assert torch.equal(load_pieces(source.part(first, last)), latents.z[first:last])
    assert source.digest() == digest(json.dumps(latents.names), {"z": latents.z})
    assert source.part(4, 4) == source.part(COUNT, COUNT) == []


def test_a_part_reads_only_the_pieces_that_hold_it():
    """Of a million pieces as of three: those before and behind are not looked at."""

    class Pieces(list):
        def __init__(self, pieces):
            super().__init__(pieces)
            self.seen = []

        def __getitem__(self, number):
            self.seen.append(number)
            return super().__getitem__(number)

        def __iter__(self):
            raise AssertionError("walks through all pieces")

    counts = [3, 0, 1, 5, 2]
    pieces = Pieces(Piece(str(i), 10, 10 + n, False) for i, n in enumerate(counts))
    source = LatentSource([], pieces, list(itertools.accumulate(counts)))
    assert source.part(2, 6) == [Piece("0", 12, 13, False), Piece("2", 10, 11, False), Piece("3", 10, 12, False)]
    assert pieces.seen == [0, 1, 2, 3]
    pieces.seen.clear()
    assert source.part(8, 9) == [Piece("3", 14, 15, False)] and pieces.seen == [3]


def test_latents_in_shards(latents, tmp_path):
    for i, part in enumerate((range(6), range(6, COUNT))):
        with tarfile.open(tmp_path / f"{i}.tar", "w") as tar:
            for k in part:
                add(tar, f"{k:02d}.npy", npy(latents.z[k].numpy()))
                add(tar, f"{k:02d}.txt", b"a caption")
    source = list_latents(tmp_path, is_one_set=False)
    assert source.names[:1] + source.names[-1:] == ["0/00", f"1/{COUNT - 1}"]
    assert torch.equal(load_pieces(source.part(4, 9)), latents.z[4:9])
    before = source.digest()
    with tarfile.open(tmp_path / "1.tar", "w") as tar:
        for k in range(6, COUNT):
            add(tar, f"{k:02d}.npy", npy(latents.z[k].numpy() + (k == 7)))
    assert list_latents(tmp_path, is_one_set=False).digest() != before


def test_sources_that_cannot_be_used(latents, tmp_path):
    def fails(listing, path, *args):
        with pytest.raises(InputError) as e:
            listing(path, *args)
        return str(e.value)

    assert "neither a file nor a folder" in fails(list_images, tmp_path / "none")
    assert "no .safetensors files and no .tar shards" in fails(list_latents, tmp_path, True)
    (tmp_path / "x.tar").write_bytes(b"not a tar")
    assert "x.tar is not a readable, uncompressed tar file" in fails(list_images, tmp_path)
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        add(tar, "a.txt", b"")
    assert "x.tar holds no" in fails(list_images, tmp_path) and "holds no .npy" in fails(list_latents, tmp_path, True)
    (tmp_path / "x.tar").unlink()
    save_latents(latents, tmp_path / "a.safetensors")
    save_latents(Latents(latents.z[:, :8].contiguous(), latents.names), tmp_path / "b.safetensors")
    assert "must agree in shape and dtype" in fails(list_latents, tmp_path, False)
    save_latents(Latents(latents.z.half(), latents.names), tmp_path / "b.safetensors")
    assert "must agree in shape and dtype" in fails(list_latents, tmp_path, False)
    save_latents(latents, tmp_path / "b.safetensors")
    assert "names must be unique" in fails(list_latents, tmp_path, True)


def test_an_array_that_cannot_be_read(tmp_path):
    for data, says in ((b"", "x.tar at byte 512 is not"), (npy(np.array([{}], dtype=object)), "not a readable .npy")):
        with tarfile.open(tmp_path / "x.tar", "w") as tar:
            add(tar, "a.npy", data)
        with pytest.raises(InputError, match=says):
            load_pieces(list_latents(tmp_path / "x.tar", False).pieces)
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        add(tar, "a.npy", npy(np.zeros((2, 3), np.float32)))
        add(tar, "b.npy", npy(np.zeros((2, 4), np.float32)))
    with pytest.raises(InputError, match=r"agree in shape, got \(2, 3\) and \(2, 4\)"):
        load_pieces(list_latents(tmp_path / "x.tar", False).pieces)
