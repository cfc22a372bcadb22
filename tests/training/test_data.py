"""Training data: sources, order, augmentation, bad input."""

import io
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from msdd_fast.errors import InputError
from msdd_fast.training.data import ImageDataset, ResumableSampler, find_images, hash_seed


def picture(seed, size=(40, 30)):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images/sub").mkdir(parents=True)
    for i in range(4):
        picture(i).save(tmp_path / f"images/{i}.png")
    picture(9).save(tmp_path / "images/sub/9.JPG", format="JPEG")
    (tmp_path / "images/notes.txt").write_text("not an image")
    return tmp_path / "images"


@pytest.fixture
def shard(tmp_path):
    path = tmp_path / "shard.tar"
    with tarfile.open(path, "w") as tar:
        for i in range(3):
            buffer = io.BytesIO()
            picture(100 + i).save(buffer, format="PNG")
            for name, data in ((f"{i:06d}.png", buffer.getvalue()), (f"{i:06d}.cls", b"7")):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def test_folders_and_shards(folder, shard):
    refs = find_images([folder, shard])
    assert [r.path.name for r in refs] == ["0.png", "1.png", "2.png", "3.png", "9.JPG", *["shard.tar"] * 3]
    for i, ref in enumerate(refs[5:]):
        stored = Image.open(io.BytesIO(ref.read()))
        assert np.array_equal(np.asarray(stored), np.asarray(picture(100 + i)))


def test_every_epoch_is_a_permutation_of_its_own(folder):
    data = ImageDataset(find_images([folder]), 16, seed=3)
    epochs = [[data.index_of(5 * e + i) for i in range(5)] for e in range(4)]
    assert all(sorted(e) == list(range(5)) for e in epochs)
    assert len({tuple(e) for e in epochs}) > 1
    assert [data.index_of(i) for i in range(5)] == epochs[0]  # going back is possible


def test_a_sample_depends_on_its_index_and_seed_only(folder):
    refs = find_images([folder])
    a, b = ImageDataset(refs, 16, seed=3), ImageDataset(refs, 16, seed=3)
    for g in (7, 0, 12):
        assert torch.equal(a[g], b[g])
    other = ImageDataset(refs, 16, seed=4)
    assert any(not torch.equal(a[g], other[g]) for g in range(5))
    assert a[0].shape == (3, 16, 16) and a[0].dtype == torch.float32
    assert a[0].min() >= -1 and a[0].max() <= 1
    assert list(ResumableSampler(6, 9)) == [6, 7, 8]


def test_whole_picture_without_augmentation(tmp_path):
    picture(0, (16, 16)).save(tmp_path / "a.png")
    data = ImageDataset(find_images([tmp_path]), 16, seed=0, min_crop=1.0, flip=False)
    expected = torch.from_numpy(np.asarray(picture(0, (16, 16))).copy()).permute(2, 0, 1) / 127.5 - 1
    torch.testing.assert_close(data[5], expected)


def test_hash_seed_is_stable():
    assert hash_seed(0, 1) == hash_seed(0, 1) != hash_seed(1, 0)
    assert 0 <= hash_seed(123, 456) < 2**63


def test_bad_sources(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.tar").write_bytes(b"x" * 2000)
    tarfile.open(tmp_path / "none.tar", "w").close()
    for source, message in (
        (tmp_path / "missing", r"data must be folders or .tar shards, got .*missing"),
        (tmp_path / "empty", r"no images \(.*\) found in .*empty"),
        (tmp_path / "none.tar", r"data shard .*none.tar holds no images"),
        (tmp_path / "broken.tar", r"data shard .*broken.tar is not a readable, uncompressed tar file"),
    ):
        with pytest.raises(InputError, match=message):
            find_images([folder, source])


def test_a_damaged_picture_is_named(tmp_path):
    (tmp_path / "bad.jpg").write_bytes(b"not a jpeg")
    with pytest.raises(InputError, match=r"bad.jpg at byte 0: not a readable image"):
        ImageDataset(find_images([tmp_path]), 16, seed=0)[0]
    with pytest.raises(InputError, match=r"min_crop must be in \(0, 1\], got 0"):
        ImageDataset([], 16, seed=0, min_crop=0)
