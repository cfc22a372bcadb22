"""Pictures in and out."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

from msdd_fast.errors import InputError
from msdd_fast.io.images import (
    center_crop,
    find_image_files,
    grid_image,
    load_image,
    require_picture_path,
    save_image,
    to_image,
    to_tensor,
)
from msdd_fast.ops._patches import to_uint8


def noise_image(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def pixels(image):
    return np.asarray(image)


def test_tensor_round_trip_is_exact():
    image = Image.fromarray(np.arange(256 * 3, dtype=np.uint32).astype(np.uint8).reshape(16, 16, 3))
    x = to_tensor(image)
    assert x.shape == (3, 16, 16) and x.dtype == torch.float32
    assert x.min() == -1 and x.max() == 1
    assert np.array_equal(pixels(to_image(x)), pixels(image))


def test_to_uint8():
    """clamp(127.5 x + 128, 0, 255), truncated (docs/spec.md#quantise-pixels)."""
    x = torch.tensor([-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 7.0])
    assert to_uint8(x).tolist() == [0, 0, 64, 128, 191, 255, 255]
    assert to_uint8(x.bfloat16()).dtype == torch.uint8


def test_center_crop():
    image = noise_image(30, 20)
    middle = image.crop((5, 0, 25, 20))
    assert np.array_equal(pixels(center_crop(image, 20)), pixels(middle))
    # A whole factor averages blocks (rounded once per axis).
    blocks = pixels(middle).reshape(10, 2, 10, 2, 3).mean(axis=(1, 3))
    assert np.abs(pixels(center_crop(image, 10)) - blocks).max() <= 1
    # Others are bicubic, up or down.
    for size in (7, 33):
        expected = middle.resize((size, size), Image.Resampling.BICUBIC)
        assert np.abs(pixels(center_crop(image, size)).astype(int) - pixels(expected)).max() <= 1


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tiff", ".webp", ".jpg", ".PNG"])
def test_save_and_load(tmp_path, suffix):
    image = Image.fromarray(np.full((8, 12, 3), (200, 100, 50), dtype=np.uint8))
    path = tmp_path / "new" / f"x{suffix}"
    save_image(image, path)
    loaded = load_image(path)
    assert loaded.size == (12, 8) and loaded.mode == "RGB"
    assert np.abs(pixels(loaded).astype(int) - (200, 100, 50)).max() <= 4
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1", "I;16"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    gray = (np.linspace(0, 255, 64).round().astype(np.uint8)).reshape(8, 8)
    if mode == "I;16":
        image = Image.fromarray(gray.astype(np.uint16) * 257)
    else:
        image = Image.fromarray(gray).convert("RGB" if mode == "CMYK" else "L").convert(mode)
    path = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    image.save(path)
    loaded = load_image(path)
    assert loaded.mode == "RGB"
    if mode != "1":
        assert np.abs(pixels(loaded).astype(int) - gray[:, :, None]).max() <= 1


def test_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    noise_image(10, 6).save(tmp_path / "x.png", exif=exif)
    assert load_image(tmp_path / "x.png").size == (6, 10)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif", ".bmp"])
@pytest.mark.parametrize("keep", [0, 10, 0.5])
def test_damaged_image(tmp_path, suffix, keep):
    path = tmp_path / f"x{suffix}"
    noise_image(64, 64).save(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    with pytest.raises(InputError, match=rf"x\{suffix} is not a readable image"):
        load_image(path)


def test_not_an_image(tmp_path):
    (tmp_path / "x.png").write_text("hello")
    with pytest.raises(InputError, match=r"x\.png is not a readable image"):
        load_image(tmp_path / "x.png")
    with pytest.raises(InputError, match="is not a readable image"):
        load_image(tmp_path)
    with pytest.raises(InputError, match=r"image file .*none\.png does not exist"):
        load_image(tmp_path / "none.png")


def test_find_image_files(tmp_path):
    for name in ("b.png", "a.JPG", "sub/c.webp", "notes.txt", ".hidden.png", "sub/._c.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    assert find_image_files(tmp_path) == [tmp_path / "a.JPG", tmp_path / "b.png", tmp_path / "sub" / "c.webp"]
    assert find_image_files(tmp_path / "notes.txt") == [tmp_path / "notes.txt"]
    with pytest.raises(InputError, match=r"no images \(\.bmp, .*\) found in .*folder\.png"):
        find_image_files(tmp_path / "folder.png")
    with pytest.raises(InputError, match="none is neither a file nor a folder"):
        find_image_files(tmp_path / "none")


def test_failed_write_leaves_the_old_picture(tmp_path, monkeypatch):
    path = tmp_path / "x.png"
    save_image(noise_image(4, 4), path)
    before = path.read_bytes()
    broken = noise_image(4, 4, seed=1)

    def fail(target):
        target.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(broken, "save", fail)
    with pytest.raises(InputError, match=r"cannot write .*x\.png: No space left on device"):
        save_image(broken, path)
    assert os.listdir(tmp_path) == ["x.png"]
    assert path.read_bytes() == before


@pytest.mark.parametrize("check", [require_picture_path, lambda path: save_image(noise_image(2, 2), path)])
def test_unwritable(tmp_path, check):
    (tmp_path / "file").touch()
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(InputError, match=r"output must end in one of \.bmp, .*, got 'x\.txt'"):
        check(tmp_path / "x.txt")
    for path in (tmp_path / "file" / "sub" / "x.png", "/proc/msdd/x.png"):
        with pytest.raises(InputError, match=rf"cannot write {path}: \w"):
            check(path)
    with pytest.raises(InputError, match=r"folder\.png"):
        check(tmp_path / "folder.png")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder.png"]
    assert not os.listdir(tmp_path / "folder.png")


def test_probing_leaves_nothing(tmp_path):
    require_picture_path(tmp_path / "new" / "folder" / "x.png")
    assert not os.listdir(tmp_path)


def test_grid():
    coarse, fine = torch.full((3, 2, 2), -1.0), torch.full((3, 4, 4), 1.0)
    image = grid_image([[coarse, fine], [fine]], size=4, gap=2)
    assert image.size == (10, 10)
    red = pixels(image)[:, :, 0]
    assert (red[:4, :4] == 0).all() and (red[:4, 6:] == 255).all()
    assert (red[4:6] == 255).all() and (red[6:, 6:] == 255).all()
