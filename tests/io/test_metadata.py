"""Orientation is all that EXIF decides, and nothing else in a file's metadata can spoil an image."""

import io
import random
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from msdd_fast.errors import InputError
from msdd_fast.io.images import load_image
from msdd_fast.io.metadata import Directory, exif_orientation, split
from tests.io.png import chunk

CORNERS = Image.fromarray(np.random.default_rng(0).integers(0, 256, (3, 5, 3), dtype=np.uint8)).resize((80, 48), 0)


def exif(*fields, order="<", orientation=6):
    """An EXIF block: fields (tag, type, count, 4 bytes of value), and the orientation unless it is None."""
    mark = b"II*\0" if order == "<" else b"MM\0*"
    own = [] if orientation is None else [(0x0112, 3, 1, struct.pack(order + "HH", orientation, 0))]
    entries = sorted([*own, *fields])
    body = b"".join(struct.pack(order + "HHI", *e[:3]) + e[3] for e in entries)
    return b"Exif\0\0" + mark + struct.pack(order + "I", 8) + struct.pack(order + "H", len(entries)) + body + bytes(4)


def stored(format, block=None, image=CORNERS):
    out = io.BytesIO()
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}.get(format, {})
    image.save(out, format, **({} if block is None else {"exif": block}), **options)
    return out.getvalue()


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF", "MPO"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation(format, orientation):
    block = Image.Exif()
    block[0x0112] = orientation
    data = stored(format, block)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    loaded = load_image("x", data)
    assert loaded.size == ((48, 80) if orientation > 4 else (80, 48))
    assert np.array_equal(np.asarray(loaded), np.asarray(expected))


@pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_adobe_deflate", "jpeg"])
@pytest.mark.parametrize("bits", [8, 16])
def test_orientation_of_a_tiff(compression, bits):
    image = CORNERS if bits == 8 else Image.fromarray(np.asarray(CORNERS)[..., 0].astype(np.uint16) * 257)
    if compression == "jpeg" and bits == 16:
        pytest.skip("JPEG has 8 bits")
    out, plain = io.BytesIO(), io.BytesIO()
    image.save(out, "TIFF", compression=compression, tiffinfo={0x0112: 6})
    image.save(plain, "TIFF", compression=compression)
    turned = load_image("x", plain.getvalue()).transpose(Image.Transpose.ROTATE_270)
    assert np.array_equal(np.asarray(load_image("x", out.getvalue())), np.asarray(turned))


# Tags that Pillow reads while it opens or turns an image, and some that nobody knows.
TAGS = (
    *(0x0100, 0x0102, 0x0103, 0x010F, 0x0110, 0x011A, 0x011B, 0x0128, 0x0131, 0x0132, 0x013E, 0x0211, 0x0212, 0x0213),
    *(0x02BC, 0x8298, 0x83BB, 0x8649, 0x8769, 0x8773, 0x8825, 0x9286, 0x927C, 0xA005, 0xC4A5, 0xEA1C, 0xFFFF),
)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_fields_of_any_type(format):
    """Every tag with every type, count and value: the image loads, upright."""
    plain = stored(format)
    for tag in TAGS:
        for kind in (*range(0, 20), 129, 0xFFFF):
            for count, value in (
                (0, b"\0\0\0\0"),
                (1, b"\1\0\0\0"),
                (4, b"in\0\0"),
                (1, b"\xff" * 4),
                (2**31, b"\0" * 4),
            ):
                block = exif((tag, kind, count, value))
                data = _with_exif(format, plain, block)
                assert load_image("x", data).size == (48, 80), (tag, kind, count, value)


def _with_exif(format, plain, block):
    """As stored(), without Pillow's reading of the block."""
    if format == "JPEG":
        return plain[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + plain[2:]
    if format == "PNG":
        body = b"eXIf" + block[6:]
        chunk = struct.pack(">I", len(block) - 6) + body + struct.pack(">I", zlib.crc32(body))
        return plain[:33] + chunk + plain[33:]
    return stored(format, block)


@pytest.mark.parametrize("kind", range(0, 20))
@pytest.mark.parametrize("tag", [0x010F, 0x011A, 0x0128, 0x02BC, 0x8769, 0x8825, 0x83BB])
def test_fields_of_any_type_in_a_tiff(tag, kind):
    size = CORNERS.width * CORNERS.height * 3
    entries = [
        *((256, 4, 1, CORNERS.width), (257, 4, 1, CORNERS.height), (258, 3, 3, 200), (259, 3, 1, 1), (262, 3, 1, 2)),
        *((273, 4, 1, 300), (0x0112, 3, 1, 6), (277, 3, 1, 3), (278, 4, 1, CORNERS.height), (279, 4, 1, size)),
        (tag, kind, 3, 0xFFFFFFF0),
    ]
    body = b"".join(struct.pack("<HHII", *e) for e in sorted(entries))
    head = b"II*\0" + struct.pack("<IH", 8, len(entries)) + body + struct.pack("<I", 0xFFFFFF)  # no such next page
    data = head.ljust(200, b"\0") + struct.pack("<3H", 8, 8, 8)
    data = data.ljust(300, b"\0") + np.asarray(CORNERS).tobytes()
    turned = CORNERS.transpose(Image.Transpose.ROTATE_270)
    assert np.array_equal(np.asarray(load_image("x", data)), np.asarray(turned))


@pytest.mark.parametrize(
    ("kind", "value", "turned"),
    [
        (3, b"\6\0\0\0", True),
        (1, b"\6\0\0\0", True),
        (4, b"\6\0\0\0", True),
        (9, b"\6\0\0\0", True),
        (11, struct.pack("<f", 6), True),
        (3, b"\0\0\0\0", False),
        (3, b"\x09\0\0\0", False),
        (3, b"\xff\xff\0\0", False),
        (8, b"\xff\xff\0\0", False),
        (11, struct.pack("<f", 6.5), False),
        (11, struct.pack("<f", float("nan")), False),
        (2, b"6\0\0\0", False),
        (99, b"\6\0\0\0", False),
        (5, b"\xff\xff\xff\xff", False),
    ],
)
def test_types_of_the_orientation(kind, value, turned):
    data = _with_exif("JPEG", stored("JPEG"), exif((0x0112, kind, 1, value), orientation=None))
    assert load_image("x", data).size == ((48, 80) if turned else (80, 48))
    assert exif_orientation(exif(order=">")) == 6 == exif_orientation(exif()[6:])
    assert exif_orientation(None) == exif_orientation(b"") == exif_orientation("x") == 1


def test_what_a_decoder_would_trip_over():
    png = stored("PNG", exif())

    text = chunk(b"zTXt", b"key\0\0" + zlib.compress(bytes(2**27)))  # 128 MB of text
    assert load_image("x", png[:33] + text + png[33:]).size == (48, 80)
    jpeg = stored("JPEG", exif())

    def segment(marker, body):
        return bytes((0xFF, marker)) + struct.pack(">H", len(body) + 2) + body

    broken_index = segment(0xE2, b"MPF\0II*\0\xff\xff\xff\xff")
    photoshop = segment(0xED, b"Photoshop 3.0\0" + b"\xff" * 30)
    fill = b"\xff" * 3
    data = jpeg[:2] + broken_index + photoshop + segment(0xE5, b"") + segment(0xFE, b"\xff" * 9) + fill + jpeg[2:]
    assert load_image("x", data).size == (48, 80)


def test_the_first_page_or_frame():
    other = ImageOps.invert(CORNERS)
    for format in ("TIFF", "GIF", "WEBP", "PNG", "MPO"):
        options = {"WEBP": {"lossless": True}, "MPO": {"quality": 95}}.get(format, {})
        out, alone = io.BytesIO(), io.BytesIO()
        CORNERS.save(out, format, save_all=True, append_images=[other], **options)
        CORNERS.save(alone, "JPEG" if format == "MPO" else format, **options)
        assert np.array_equal(*(np.asarray(load_image("x", d.getvalue())) for d in (out, alone))), format


def test_cut_off_anywhere_raises_nothing_here():
    for data in (stored("JPEG", exif()), stored("PNG", exif()), stored("TIFF", exif()), exif()[6:]):
        for end in range(len(data)) if len(data) < 500 else range(0, len(data), 13):
            split(data[:end])
            directory = Directory(data[:end])
            assert 1 <= directory.orientation <= 8
            directory.layout_only(), directory.raw(34675)


def test_bigtiff():
    entry = struct.pack("<HHQQ", 0x0112, 3, 1, 8)
    directory = Directory(b"II+\0" + struct.pack("<HHQQ", 8, 0, 16, 1) + entry + bytes(8))
    assert directory.orientation == 8


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP", "PPM"])
def test_damage_is_an_input_error(format):
    """Bytes changed at random: an RGB image or InputError, nothing else."""
    rng = random.Random(format)
    whole = stored(format, exif() if format in ("JPEG", "PNG", "WEBP", "TIFF") else None)
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 8)):
            data[rng.randrange(min(len(data), 600))] = rng.randrange(256)
        try:
            assert load_image("x", bytes(data)).mode == "RGB"
        except InputError as e:
            assert str(e).startswith("x is not a readable image: ")


def test_a_bigtiff_that_points_beyond_what_python_can_index():
    data = b"MM\0+\0\x08\0\0" + b"\xff" * 40
    assert split(data).orientation == 1
    entry = struct.pack(">HHQQ", 0x0112, 3, 60, 2**64 - 1)
    data = b"MM\0+\0\x08\0\0" + struct.pack(">QQ", 16, 1) + entry
    assert split(data).orientation == 1
