"""Pictures in and out."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from msdd_fast.errors import InputError
from msdd_fast.io.images import (
    FORMATS,
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
    with pytest.raises(InputError, match="is not a readable image: Is a directory"):
        load_image(tmp_path)
    (tmp_path / "x.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"x\.png is not a readable image: the file is empty"):
        load_image(tmp_path / "x.png")
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


def test_a_search(tmp_path, caplog):
    """Links are followed, loops end, hidden companions and folders are left out, other formats are counted."""
    elsewhere = tmp_path / "elsewhere"
    for name in ("in/a.png", "in/sub/b.JPEG", "in/__MACOSX/a.png", "in/__MACOSX/._a.png", "in/.cache/d.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).touch()
    elsewhere.mkdir()
    for name in ("c.png", "x.heic", "y.HEIC", "z.jfif", "v.avif", "w.gif", "._w.gif", "notes.txt"):
        (elsewhere / name).touch()
    (tmp_path / "in/linked").symlink_to(elsewhere)
    (tmp_path / "in/again").symlink_to(elsewhere)
    (tmp_path / "in/sub/loop").symlink_to(tmp_path / "in")
    (elsewhere / "self").symlink_to(elsewhere)
    (tmp_path / "in/link.png").symlink_to(elsewhere / "c.png")
    (tmp_path / "in/broken.png").symlink_to(tmp_path / "nothing")
    found = [str(p.relative_to(tmp_path / "in")) for p in find_image_files(tmp_path / "in")]
    assert found == ["a.png", "again/c.png", "link.png", "sub/b.JPEG"]
    assert "passed over 1 .avif, 1 .gif, 2 .heic, 1 .jfif; read are .bmp, " in caplog.text
    (elsewhere / "c.png").unlink()
    with pytest.raises(InputError, match=r"no images .*; passed over: 1 \.avif, 1 \.gif, 2 \.heic, 1 \.jfif"):
        find_image_files(elsewhere)
    hidden = tmp_path / ".photos"  # the folder that is named may be hidden itself
    hidden.mkdir()
    (hidden / "a.png").touch()
    assert find_image_files(hidden) == [hidden / "a.png"]


def test_a_folder_that_cannot_be_searched_is_reported(tmp_path, caplog, monkeypatch):
    (tmp_path / "a.png").touch()
    (tmp_path / "locked").mkdir()
    scandir = os.scandir

    def denied(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    assert find_image_files(tmp_path) == [tmp_path / "a.png"]
    assert "locked cannot be searched: Permission denied" in caplog.text


BAD_PATHS = [
    (None, "must be a str or a path, got NoneType"),
    (7, "must be a str or a path, got int"),
    (b"x.png", "must be a str or a path, got bytes"),
    ("", "must name a file or a folder, got an empty str"),
    ("a\0.png", r"must not hold a NUL character, got 'a\\x00.png'"),
]


@pytest.mark.parametrize(("path", "message"), BAD_PATHS)
def test_what_is_no_path(path, message):
    with pytest.raises(InputError, match=f"^path {message}"):
        load_image(path)
    with pytest.raises(InputError, match=f"^source {message}"):
        find_image_files(path)
    for write in (require_picture_path, lambda p: save_image(noise_image(2, 2), p)):
        with pytest.raises(InputError, match=f"^output {message}"):
            write(path)


def test_names_that_are_too_long():
    name = "x" * 5000 + ".png"
    with pytest.raises(InputError, match=r"xxx.png is not a readable image: File name too long"):
        load_image(name)
    with pytest.raises(InputError, match=r"xxx.png is neither a file nor a folder: File name too long"):
        find_image_files(name)
    with pytest.raises(InputError, match="File name too long"):
        save_image(noise_image(2, 2), name)


@pytest.mark.parametrize("data", ["text", 7, [1, 2], np.zeros(3, np.uint8)])
def test_what_is_no_data(data):
    with pytest.raises(InputError, match=r"^data must be the bytes of an image file, got "):
        load_image("x.png", data)


def test_wrong_kinds_of_argument(tmp_path):
    image = noise_image(4, 4)
    for call in (lambda v: center_crop(v, 2), to_tensor, lambda v: save_image(v, tmp_path / "x.png")):
        for value in (None, "x.png", np.zeros((4, 4, 3), np.uint8)):
            with pytest.raises(InputError, match=f"^image must be a PIL image, got {type(value).__name__}"):
                call(value)
    for size in (0, -1, True, 2.0, "2", None):
        with pytest.raises(InputError, match=f"^size must be a positive integer, got {size!r}"):
            center_crop(image, size)
    assert center_crop(image, np.int64(2)).size == (2, 2)
    with pytest.raises(InputError, match=r"^image must be RGB, as load_image gives it, got mode L$"):
        to_tensor(image.convert("L"))
    for x in (None, pixels(image), torch.zeros(4, 4), torch.zeros(1, 3, 4, 4), torch.zeros(3, 4, 4, dtype=torch.uint8)):
        with pytest.raises(InputError, match=r"^x must be a floating-point tensor \(3, H, W\), got "):
            to_image(x)


def test_a_file_and_its_bytes_are_the_same_image(tmp_path):
    image = noise_image(33, 21)
    for suffix, options in (
        (".tif", {"compression": "tiff_lzw"}),
        (".png", {}),
        (".jpg", {}),
        (".webp", {}),
        (".gif", {}),
    ):
        path = tmp_path / f"x{suffix}"
        image.save(path, **options)
        path.rename(tmp_path / "called.png")  # the content decides, not the name
        path = tmp_path / "called.png"
        assert np.array_equal(pixels(load_image(path)), pixels(load_image("x", path.read_bytes())))
        assert np.array_equal(pixels(load_image(path)), pixels(load_image("x", bytearray(path.read_bytes()))))


@pytest.mark.parametrize("head", [b"%!PS-Adobe-3.0 EPSF-3.0\n", b"\xc5\xd0\xd3\xc6"])
def test_no_program_is_started(tmp_path, monkeypatch, head):
    """A PostScript file with the name of a picture is refused; Pillow would hand it to Ghostscript."""
    started = []
    monkeypatch.setattr("subprocess.Popen.__init__", lambda *args, **kwargs: started.append(args))
    body = b"%%BoundingBox: 0 0 10 10\n%%EndComments\n0 0 10 10 rectfill showpage\n"
    (tmp_path / "photo.png").write_bytes(head + body)
    with pytest.raises(InputError, match="its format is PostScript, read are PNG, JPEG"):
        load_image(tmp_path / "photo.png")
    assert not started
    assert not {"EPS", "PDF", "WMF", "FITS"} & set(FORMATS)


@pytest.mark.parametrize(
    ("head", "name"),
    [
        (b"\0\0\0\x18ftypheic", "HEIC"),
        (b"\0\0\0\x18ftypmif1", "HEIC"),
        (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000"),
        (b"\xff\x0a", "JPEG XL"),
        (b"8BPS", "PSD"),
        (b"%PDF-1.4", "PDF"),
    ],
)
def test_other_formats_are_named(head, name):
    with pytest.raises(InputError, match=f"^x is not a readable image: its format is {name}, read are PNG, JPEG"):
        load_image("x", head + bytes(100))


def png_head(width, height):
    """A PNG that says how large it is, without pixels."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(b"")), (b"IEND", b""))
    parts = (struct.pack(">I", len(b)) + n + b + struct.pack(">I", zlib.crc32(n + b)) for n, b in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def huge_tile(width, height):
    """A TIFF of 16 x 16 pixels whose one tile has another size."""
    data = zlib.compress(bytes(1000))
    entries = [(256, 4, 16), (257, 4, 16), (258, 3, 8), (259, 3, 8), (262, 3, 1), (277, 3, 1), (322, 4, width)]
    entries += [(323, 4, height), (324, 4, 134), (325, 4, len(data))]
    body = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in entries)
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + body + bytes(4) + data


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_the_limit_on_pixels(monkeypatch):
    limit = "images must have at most 67108864 pixels"
    for data in (png_head(8193, 8193), png_head(2**26 + 1, 1), huge_tile(32768, 32768)):
        with pytest.raises(InputError, match=f"{limit}, got .*; the environment variable MSDD_FAST_MAX_PIXELS sets"):
            load_image("x", data)
    with pytest.raises(InputError, match=limit):
        load_image("x", png_head(2**31 - 1, 2**31 - 1))
    with pytest.raises(InputError, match=r"truncated|broken|decoder"):
        load_image("x", png_head(8192, 8192))
    out = io.BytesIO()
    noise_image(20, 10).save(out, "PNG")
    monkeypatch.setenv("MSDD_FAST_MAX_PIXELS", "199")
    with pytest.raises(InputError, match="at most 199 pixels, got 20 x 10"):
        load_image("x", out.getvalue())
    monkeypatch.setenv("MSDD_FAST_MAX_PIXELS", "200")
    assert load_image("x", out.getvalue()).size == (20, 10)
    for text in ("0", "-1", "many", "1e9", "\u0663"):
        monkeypatch.setenv("MSDD_FAST_MAX_PIXELS", text)
        with pytest.raises(InputError, match="MSDD_FAST_MAX_PIXELS must be a positive integer, got"):
            load_image("x", out.getvalue())


def test_the_limit_on_files(tmp_path, monkeypatch):
    noise_image(20, 10).save(tmp_path / "x.png")
    monkeypatch.setattr("msdd_fast.io.images.MAX_FILE_BYTES", 100)
    with pytest.raises(InputError, match=r"x.png is not a readable image: files must have at most 100 bytes"):
        load_image(tmp_path / "x.png")


def test_what_a_decoder_throws(monkeypatch):
    out = io.BytesIO()
    noise_image(4, 4).save(out, "PNG")
    for error in (MemoryError(), RecursionError("deep"), AttributeError("x"), struct.error("y"), OverflowError("z")):

        def fail(self, error=error):
            raise error

        monkeypatch.setattr("PIL.ImageFile.ImageFile.load", fail)
        with pytest.raises(InputError, match=r"^x is not a readable image: "):
            load_image("x", out.getvalue())


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
