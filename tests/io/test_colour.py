"""Depth, alpha and colour profiles: the right values, or a refusal that says why."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from msdd_fast.errors import InputError
from msdd_fast.io.colour import BACKGROUND
from msdd_fast.io.images import load_image
from tests.io import profiles
from tests.io.png import chunk

GREY = np.linspace(0, 255, 48 * 80).reshape(48, 80).astype(np.uint8)
RGB = np.stack([GREY, GREY[::-1], 255 - GREY], axis=-1)
ALPHA = np.full_like(GREY, 128)
RGBA = np.dstack([RGB, ALPHA])
OVER_WHITE = (RGB * 128.0 + 255 * 127) / 255


def stored(image, format, **options):
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def loaded(data):
    return np.asarray(load_image("x", data)).astype(int)


def near(data, expected, tolerance=1):
    expected = np.dstack([expected] * 3) if np.ndim(expected) == 2 else expected
    got = loaded(data)
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() <= tolerance


def refusal(data):
    with pytest.raises(InputError, match=r"^x is not a readable image: ") as e:
        load_image("x", data)
    return str(e.value)


# --- depth


def tiff(pixels, **options):
    tifffile = pytest.importorskip("tifffile")
    out = io.BytesIO()
    tifffile.imwrite(out, pixels, **options)
    return out.getvalue()


def deep(pixels):
    return pixels.astype(np.uint16) * 257


LAYOUTS = [
    {},
    {"tile": (16, 16)},
    {"compression": "zlib"},
    {"compression": "zlib", "predictor": True},
    {"compression": "zlib", "tile": (32, 16)},
    {"byteorder": ">"},
    {"byteorder": ">", "compression": "zlib"},
    {"bigtiff": True},
    {"rowsperstrip": 7},
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("kind", ["grey", "white is zero", "rgb", "planes", "rgba"])
def test_every_layout_of_a_tiff(layout, bits, kind):
    pixels, options, expected = {
        "grey": (GREY, {"photometric": "minisblack"}, GREY),
        "white is zero": (GREY, {"photometric": "miniswhite"}, 255 - GREY),
        "rgb": (RGB, {"photometric": "rgb"}, RGB),
        "planes": (np.moveaxis(RGB, -1, 0).copy(), {"photometric": "rgb", "planarconfig": "separate"}, RGB),
        "rgba": (RGBA, {"photometric": "rgb", "extrasamples": ["unassalpha"]}, OVER_WHITE),
    }[kind]
    data = tiff(deep(pixels) if bits == 16 else pixels, **options, **layout)
    if bits == 16 and kind == "planes" and "compression" not in layout:
        assert "a TIFF with uncompressed planes of 16 bits is not supported" in refusal(data)
    else:
        near(data, expected)


@pytest.mark.parametrize("layout", [o for o in LAYOUTS if "predictor" not in o], ids=str)
def test_float_greys_from_0_to_1(layout):
    data = tiff((GREY / 255).astype(np.float32), **layout)
    if layout.get("byteorder") == ">" and "compression" in layout:
        assert "compressed big-endian 32-bit floats" in refusal(data)
    else:
        near(data, GREY)
    near(tiff((GREY / 255).astype(np.float32), photometric="miniswhite"), 255 - GREY)


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg", "zstd", None])
@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr"])
def test_what_pillow_writes_as_tiff(mode, compression):
    if compression == "jpeg" and mode in ("1", "P"):
        pytest.skip("Pillow writes no TIFF of this mode with JPEG")
    image = Image.fromarray(RGB).convert(mode)
    near(
        stored(image, "TIFF", compression=compression),
        np.asarray(image.convert("RGB")),
        30 if compression == "jpeg" else 2,
    )


def test_fax():
    image = Image.fromarray(GREY).convert("1")
    near(stored(image, "TIFF", compression="group4"), np.asarray(image.convert("RGB")))


def test_the_range_that_a_tiff_gives():
    greys = np.arange(0, 256, dtype=np.int32).reshape(16, 16)
    near(tiff(greys, extratags=[(340, 9, 1, 0, True), (341, 9, 1, 255, True)]), greys)
    near(tiff(greys - 100, extratags=[(340, 9, 1, -100, True), (341, 9, 1, 155, True)]), greys)
    near(tiff(greys.astype(np.float32), extratags=[(340, 11, 1, 0.0, True), (341, 11, 1, 255.0, True)]), greys)
    near(tiff(greys.astype(np.uint16) * 16, extratags=[(341, 3, 1, 255 * 16, True)]), greys)
    near(tiff(greys.astype(np.uint32) * 2**24, extratags=[(341, 4, 1, 255 * 2**24, True)]), greys)
    assert "greys must be in [0, 100], got 0 to 255" in refusal(
        tiff(greys, extratags=[(340, 9, 1, 0, True), (341, 9, 1, 100, True)])
    )


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (GREY.astype(np.int32), "32-bit signed greys without a scale (TIFF tags 340 and 341) are not supported"),
        (GREY.astype(np.uint32), "32-bit unsigned greys without a scale"),
        (GREY.astype(np.int16), "16-bit signed greys without a scale"),
        (GREY.astype(np.int8), "a TIFF with 1 channel(s) of 8-bit signed integers is not supported"),
        (GREY.astype(np.float32), "greys must be in [0, 1], got 0 to 255"),
        (GREY.astype(np.float32) / 255 - 0.5, "greys must be in [0, 1], got -0.5 to 0.5"),
        (np.full((9, 9), np.nan, np.float32), "greys must be in [0, 1], got nan to nan"),
        ((GREY / 255).astype(np.float16), "a TIFF with 1 channel(s) of 16-bit floats is not supported"),
        (GREY / 255, "a TIFF with 1 channel(s) of 64-bit floats is not supported"),
        ((RGB / 255).astype(np.float32), "a TIFF with 3 channel(s) of 32-bit floats is not supported"),
        (deep(np.dstack([GREY, GREY])), "TIFF layout is damaged or not supported (bits 16 16"),
        ((GREY / 255).astype(np.complex64), "samples of an unknown kind"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_samples_without_a_known_scale_are_refused(pixels, message):
    options = {"photometric": "rgb"} if pixels.shape[-1] == 3 else {"photometric": "minisblack"}
    extra = {"extrasamples": ["unassalpha"], "planarconfig": "contig"} if pixels.shape[-1] == 2 else {}
    assert message in refusal(tiff(pixels, **options, **extra))


def test_12_bits():
    values = np.arange(0, 4096, 16, dtype=np.uint16).reshape(16, 16)
    pairs = values.reshape(-1, 2).astype(int)
    packed = np.stack([pairs[:, 0] >> 4, (pairs[:, 0] & 15) << 4 | pairs[:, 1] >> 8, pairs[:, 1] & 255], 1)
    data = packed.astype(np.uint8).tobytes()
    entries = [(256, 16), (257, 16), (258, 12), (259, 1), (262, 1), (273, 200), (277, 1), (278, 16), (279, len(data))]
    directory = b"".join(struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in entries)
    head = b"II*\0" + struct.pack("<IH", 8, len(entries)) + directory + bytes(4)
    near(head.ljust(200, b"\0") + data, values >> 4, 0)


def test_16_bits_of_pillow():
    near(stored(Image.fromarray(deep(GREY)), "PNG"), GREY)
    near(stored(Image.fromarray(deep(GREY)), "TIFF"), GREY)
    near(b"P5 80 48 65535\n" + deep(GREY).astype(">u2").tobytes(), GREY)
    near(b"P5 80 48 1023\n" + (GREY.astype(np.uint32) * 1023 // 255).astype(">u2").tobytes(), GREY)
    near(b"P6 80 48 65535\n" + deep(RGB).astype(">u2").tobytes(), RGB)
    near(b"Pf\n80 48\n-1.0\n" + (GREY[::-1] / 255).astype("<f4").tobytes(), GREY)


def png(depth, kind, rows, *chunks):
    head = struct.pack(">IIBBBBB", 80, 48, depth, kind, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + r for r in rows))
    parts = (chunk(b"IHDR", head), *(chunk(*c) for c in chunks), chunk(b"IDAT", pixels), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def rows(pixels, deep=False):
    pixels = pixels.astype(">u4") * 257 if deep else pixels
    return [r.astype(">u2" if deep else "u1").tobytes() for r in pixels.reshape(len(pixels), -1)]


def packed(pixels, bits):
    spread = np.unpackbits(pixels[..., None], axis=-1)[..., 8 - bits :]
    return [np.packbits(r).tobytes() for r in spread.reshape(len(pixels), -1)]


def test_png_of_every_depth():
    near(png(16, 0, rows(GREY, deep=True)), GREY)
    near(png(16, 2, rows(RGB, deep=True)), RGB)
    near(png(16, 4, rows(np.dstack([GREY, ALPHA]), deep=True)), (GREY * 128.0 + 255 * 127) / 255)
    near(png(16, 6, rows(RGBA, deep=True)), OVER_WHITE)
    for bits in (1, 2, 4):
        few = GREY >> (8 - bits)
        near(png(bits, 0, packed(few, bits)), few.astype(int) * 255 // (2**bits - 1))


# --- alpha


def test_what_lies_under_transparent_pixels_does_not_count():
    assert BACKGROUND == (255, 255, 255)
    for colour in ((0, 0, 0), (255, 0, 0), (12, 200, 90)):
        for format in ("PNG", "TIFF", "WEBP"):
            options = {"lossless": True, "exact": True} if format == "WEBP" else {}
            data = stored(Image.new("RGBA", (8, 8), (*colour, 0)), format, **options)
            assert (loaded(data) == 255).all()
    half = loaded(stored(Image.new("RGBA", (8, 8), (0, 0, 0, 128)), "PNG"))
    assert np.abs(half - 127).max() <= 1
    assert (loaded(stored(Image.new("LA", (8, 8), (77, 0)), "PNG")) == 255).all()
    opaque = Image.fromarray(np.dstack([RGB, np.full_like(GREY, 255)]))
    near(stored(opaque, "PNG"), RGB, 0)


@pytest.mark.parametrize("compression", [None, "zlib"])
def test_alpha_of_a_tiff(compression):
    premultiplied = np.dstack([(RGB.astype(int) * 128 // 255).astype(np.uint8), ALPHA])
    options = {"photometric": "rgb", "compression": compression}
    near(tiff(premultiplied, extrasamples=["assocalpha"], **options), OVER_WHITE, 3)
    near(tiff(deep(premultiplied), extrasamples=["assocalpha"], **options), OVER_WHITE, 3)
    near(tiff(RGBA, extrasamples=["unspecified"], **options), RGB)  # a channel that is not alpha
    planes = np.moveaxis(RGBA, -1, 0).copy()
    near(tiff(planes, extrasamples=["unassalpha"], planarconfig="separate", **options), OVER_WHITE)


def test_transparent_colours():
    """tRNS of grey, colour and palette, in every depth; and GIF's."""
    clear = np.where(GREY[5, 5] == GREY, 255, GREY)
    near(png(8, 0, rows(GREY), (b"tRNS", struct.pack(">H", GREY[5, 5]))), clear, 0)
    near(png(16, 0, rows(GREY, deep=True), (b"tRNS", struct.pack(">H", int(GREY[5, 5]) * 257))), clear)
    hit = (RGB[5, 5] == RGB).all(axis=-1, keepdims=True)
    near(png(8, 2, rows(RGB), (b"tRNS", struct.pack(">3H", *map(int, RGB[5, 5])))), np.where(hit, 255, RGB), 0)
    for bits in (1, 2, 4):
        few, top = GREY >> (8 - bits), 2**bits - 1
        near(
            png(bits, 0, packed(few, bits), (b"tRNS", struct.pack(">H", 1))),
            np.where(few == 1, 255, few.astype(int) * 255 // top),
        )
    assert "16 bits a channel and a transparent colour" in refusal(
        png(16, 2, rows(RGB, deep=True), (b"tRNS", struct.pack(">3H", 0, 0, 0)))
    )
    palette, few = np.array([(255, 0, 0), (0, 255, 0), (0, 0, 255), (9, 9, 9)], np.uint8), GREY >> 6
    alpha = np.array([0, 128, 255, 255]) / 255
    expected = palette[few] * alpha[few][..., None] + 255 * (1 - alpha[few][..., None])
    near(png(2, 3, packed(few, 2), (b"PLTE", palette.tobytes()), (b"tRNS", bytes([0, 128]))), expected)
    flat = Image.new("P", (8, 8), 0)
    flat.putpalette([9, 90, 200] + [0] * 765)
    assert (loaded(stored(flat, "PNG", transparency=0)) == 255).all()
    assert (loaded(stored(flat, "GIF", transparency=0)) == 255).all()
    assert (loaded(stored(flat, "GIF")) == (9, 90, 200)).all()


# --- profiles


def shown(image, profile):
    """What Pillow's own conversion gives."""
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    return np.asarray(converted).astype(int)


@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP"])
def test_wide_gamut_becomes_srgb(format):
    profile, image = profiles.wide(), Image.fromarray(RGB)
    expected = shown(image, profile)
    assert np.abs(expected - RGB).max() > 20
    options = {"lossless": True} if format == "WEBP" else {}
    near(stored(image, format, icc_profile=profile, **options), expected)
    over = stored(Image.fromarray(RGBA), format, icc_profile=profile, **options)
    near(over, (expected * 128 + 255 * 127) / 255, 2)  # first the colours, then alpha


def test_jpeg_with_a_profile_in_parts():
    profile = profiles.wide()
    image = Image.new("RGB", (32, 32), (60, 200, 60))
    data = stored(image, "JPEG", quality=95, icc_profile=profile)
    expected = shown(Image.new("RGB", (1, 1), (60, 200, 60)), profile)[0, 0]
    assert np.abs(loaded(data) - expected).max() <= 3
    start = data.index(b"\xff\xe2")
    plain = data[:start] + data[start + 4 + len(profile) + 14 :]

    def parts(*pieces):
        """The file with these (number, count, bytes) as segments."""
        segments = b""
        for number, count, piece in pieces:
            body = b"ICC_PROFILE\0" + bytes((number, count)) + piece
            segments += b"\xff\xe2" + struct.pack(">H", len(body) + 2) + body
        return plain[:2] + segments + plain[2:]

    unchanged = loaded(plain)
    assert np.abs(unchanged - (60, 200, 60)).max() <= 3
    a, b = profile[:200], profile[200:]
    assert (loaded(parts((2, 2, b), (1, 2, a))) == loaded(data)).all()
    assert (loaded(parts((1, 2, a))) == unchanged).all()  # one is missing
    assert (loaded(parts((1, 3, a), (3, 3, b))) == unchanged).all()


def test_grey_profiles():
    image = Image.fromarray(GREY)
    linear = shown(image, profiles.linear_grey())
    assert np.abs(linear - GREY[..., None]).max() > 50
    near(stored(image, "PNG", icc_profile=profiles.linear_grey()), linear)
    near(stored(image, "PNG", icc_profile=profiles.wide()), shown(image.convert("RGB"), profiles.wide()))
    near(stored(Image.fromarray(deep(GREY)), "PNG", icc_profile=profiles.linear_grey()), linear)


@pytest.mark.parametrize("format", ["TIFF", "JPEG"])
def test_cmyk(format):
    image = Image.new("CMYK", (16, 16), (200, 40, 10, 30))
    naive = np.asarray(image.convert("RGB")).astype(int)
    expected = shown(image, profiles.cmyk())
    assert np.abs(expected - naive).max() > 20
    near(stored(image, format, icc_profile=profiles.cmyk()), expected, 4)
    near(stored(image, format), naive, 4)
    near(stored(image, format, icc_profile=profiles.wide()), naive, 4)  # a profile for something else


def test_lab():
    lab = ImageCms.createProfile("LAB")
    soft = Image.fromarray((RGB // 4 + 96).astype(np.uint8))  # colours far from the edge of the gamut
    there = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), lab, "RGB", "LAB")
    near(stored(ImageCms.applyTransform(soft, there), "TIFF"), np.asarray(soft), 3)


def test_broken_profiles_are_ignored():
    whole = profiles.wide()
    image = Image.fromarray(RGB)
    for broken in (b"x", b"\0" * 200, whole[:100], whole[:200], whole[:128] + b"\xff" * 400, bytes(reversed(whole))):
        near(stored(image, "PNG", icc_profile=broken), RGB, 0)
        near(stored(image, "TIFF", icc_profile=broken), RGB, 0)
    chunk = b"name\0\0not zlib"
    near(png(8, 2, rows(RGB), (b"iCCP", chunk)), RGB, 0)
    near(png(8, 2, rows(RGB), (b"iCCP", b"name\0\0" + zlib.compress(bytes(2**24)))), RGB, 0)  # unpacks to 16 MB


def test_srgb_itself_changes_nothing():
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    near(stored(Image.fromarray(RGB), "PNG", icc_profile=profile), RGB, 0)
    near(stored(Image.fromarray(GREY), "PNG", icc_profile=profile), GREY, 0)
