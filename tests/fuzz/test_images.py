"""Image files, and the metadata that we read ourselves."""

import io
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageCms, TiffImagePlugin

from msdd_fast.io.images import load_image
from msdd_fast.io.metadata import Metadata, exif_orientation, split
from tests.fuzz.edits import edited, edits
from tests.fuzz.law import obeys

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 9, 4), dtype=np.uint8)


def encoded(kind, mode="RGB", **options):
    out = io.BytesIO()
    Image.fromarray(PIXELS).convert(mode).save(out, kind, **options)
    return out.getvalue()


def exif(**tags):
    found = Image.Exif()
    found[0x0112] = 6
    found[0x010E] = "a picture"
    return found.tobytes()


def samples():
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    yield from (encoded("PNG", mode) for mode in ("RGB", "RGBA", "L", "P", "1", "I;16"))
    yield encoded("PNG", exif=exif(), icc_profile=profile)
    yield encoded("JPEG", exif=exif(), icc_profile=profile)
    yield encoded("JPEG", "CMYK")
    yield from (encoded(kind) for kind in ("BMP", "GIF", "WEBP", "PPM"))
    for compression in ("raw", "tiff_lzw", "tiff_deflate", "packbits"):
        yield encoded("TIFF", compression=compression)
    for pixels in (np.linspace(0, 1, 20, dtype=np.float32), np.arange(20, dtype=np.int32), np.arange(20).astype("u2")):
        out = io.BytesIO()
        info = TiffImagePlugin.ImageFileDirectory_v2()
        info[0x0112] = 8
        Image.fromarray(pixels.reshape(4, 5)).save(out, "TIFF", tiffinfo=info)
        yield out.getvalue()


SAMPLES = list(samples())
BLOCK = encoded("JPEG", exif=exif()).partition(b"Exif\0\0")[2][:200]


@pytest.mark.filterwarnings("ignore")
@given(st.sampled_from(SAMPLES), edits)
def test_images(data, bytes_):
    """RGB of a size that the limit allows. Small headers may still promise large pictures, up to the limit."""
    data = edited(data, bytes_)

    def is_right(image):
        return image.mode == "RGB" and 0 < image.width * image.height <= 2**26

    obeys("images", lambda: load_image("x.png", data), is_right)


@given(st.one_of(st.builds(edited, st.sampled_from(SAMPLES), edits), st.binary(max_size=40)))
def test_metadata(data):
    """Never raises, and never makes more than there is, but for a profile."""

    def is_right(found):
        assert isinstance(found, Metadata) and len(found.data) <= len(data) + 64
        return found.orientation in (None, *range(1, 9))

    obeys("metadata", lambda: split(data), is_right)


@given(st.builds(edited, st.just(BLOCK), edits), st.sampled_from([b"", b"Exif\0\0"]))
def test_exif(data, head):
    obeys("EXIF", lambda: exif_orientation(head + data), lambda found: found in range(1, 9))


ENTRIES = st.lists(
    st.tuples(
        st.sampled_from(
            [254, 256, 257, 258, 259, 262, 273, 277, 278, 279, 284, 274, 317, 322, 323, 325, 338, 339, 530]
        ),
        st.sampled_from([1, 2, 3, 4, 5, 7, 11, 12, 13, 16, 0, 99]),
        st.sampled_from([0, 1, 2, 3, 64, 65, 2**16, 2**31, 2**32 - 1]),
        st.sampled_from([0, 1, 2, 3, 4, 5, 6, 7, 8, 16, 32, 200, 2**16, 2**31, 2**32 - 1]),
    ),
    max_size=14,
)


@pytest.mark.filterwarnings("ignore")
@given(st.sampled_from("<>"), ENTRIES)
def test_tiff_directories(order, entries):
    """Directories of plausible tags with any type, count and value."""
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "LH", 8, len(entries))
    data = head + b"".join(struct.pack(order + "HHLL", *e) for e in sorted(entries)) + bytes(300)
    obeys("TIFF", lambda: load_image("x.tif", data), lambda image: image.mode == "RGB")
