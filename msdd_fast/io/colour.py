"""Pixels of any kind to 8-bit sRGB, as ``load_image`` promises them."""

from __future__ import annotations

import functools
import io

import numpy as np
from PIL import Image, ImageCms

from msdd_fast.errors import InputError
from msdd_fast.io.metadata import (
    BITS,
    COMPRESSION,
    PHOTOMETRIC,
    PLANES,
    SAMPLE_FORMAT,
    SAMPLE_MAXIMUM,
    SAMPLE_MINIMUM,
    SUBSAMPLING,
    Directory,
)

BACKGROUND = (255, 255, 255)
"""What shows through transparent pixels."""
_UNSIGNED, _SIGNED, _FLOAT = 1, 2, 3  # TIFF's SampleFormat
_KINDS = {_SIGNED: "signed integers", _FLOAT: "floats"}
_SPACES = {"L": "GRAY", "RGB": "RGB", "CMYK": "CMYK"}


def check_layout(tiff: Directory) -> None:
    """Raise InputError for a TIFF whose samples a decoder would misread. What it does not know it refuses itself."""
    bits = tiff.numbers(BITS) or (1,)
    formats = tiff.numbers(SAMPLE_FORMAT) or (_UNSIGNED,)
    kind = int(max(formats))
    raw = tiff.numbers(COMPRESSION) in ((), (1,))
    known = {_SIGNED: ((16,), (32,)), _FLOAT: ((32,),)}.get(kind, ())
    if kind != _UNSIGNED and bits not in known:
        what = f"{len(bits)} channel(s) of {int(bits[0])}-bit {_KINDS.get(kind, 'samples of an unknown kind')}"
    elif tiff.big_endian and not raw and (kind != _UNSIGNED or max(bits) > 16):
        what = f"compressed big-endian {int(bits[0])}-bit {_KINDS.get(kind, 'integers')}"
    elif raw and tiff.numbers(PLANES) == (2,) and max(bits) > 8:
        what = f"uncompressed planes of {int(bits[0])} bits"
    elif raw and tiff.numbers(PHOTOMETRIC) == (6,) and (tiff.numbers(SUBSAMPLING) or (2, 2)) != (1, 1):
        what = "uncompressed, subsampled YCbCr"
    else:
        return
    raise InputError(f"a TIFF with {what} is not supported: save it as RGB or grey with 8 or 16 bits")


def describe_layout(tiff: Directory) -> str:
    """What a refusal says about a TIFF."""
    fields = {"bits": BITS, "sample format": SAMPLE_FORMAT, "photometric": PHOTOMETRIC, "compression": COMPRESSION}
    found = {name: tiff.numbers(tag) for name, tag in fields.items()}
    text = ", ".join(f"{name} {' '.join(f'{v:g}' for v in values)}" for name, values in found.items() if values)
    return f"its TIFF layout is damaged or not supported ({text or 'no directory'})"


def to_srgb(image: Image.Image, profile: bytes | None, tiff: Directory | None = None) -> Image.Image:
    """A decoded image as 8-bit sRGB over BACKGROUND.

    Greys of more than 8 bits are scaled by ``deep_grey``. ``profile`` says what the numbers mean; a damaged profile, or
    one for another kind of image, counts as none. Without one, RGB and grey are sRGB, CMYK is converted by Pillow's
    formula, and Lab is relative to D50. Raises InputError for greys whose scale is unknown.
    """
    colours, alpha = _split_alpha(image)
    if colours.mode[0] in "IF":
        colours = deep_grey(colours, tiff)
    elif colours.mode == "LAB":
        colours = _apply(colours, _from_lab())
    elif colours.mode not in _SPACES:
        colours = colours.convert("L" if colours.mode == "1" else "RGB")
    if profile:
        colours = _apply_profile(colours, profile)
    colours = colours.convert("RGB")
    if alpha is None:
        return colours
    canvas = Image.new("RGB", colours.size, BACKGROUND)
    canvas.paste(colours, mask=alpha)
    return canvas


def _split_alpha(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Colours without alpha, and alpha if there is one: a channel, a palette's, or a colour that is transparent."""
    key = image.info.get("transparency")
    if image.mode[0] == "I" and isinstance(key, int):
        return image, Image.fromarray(np.where(np.asarray(image) == key, 0, 255).astype(np.uint8))
    if image.mode in ("1", "L") and key is not None:
        image = image.convert("LA")
    elif image.mode in ("P", "PA", "RGB", "RGBa") and (key is not None or image.mode in ("PA", "RGBa")):
        image = image.convert("RGBA")
    elif image.mode == "P":
        image = image.convert("RGBA" if image.palette and image.palette.mode == "RGBA" else "RGB")
    elif image.mode == "La":
        image = image.convert("LA")
    if image.mode not in ("LA", "RGBA"):
        return image, None
    return image.convert(image.mode[:-1]), image.getchannel("A")


def deep_grey(image: Image.Image, tiff: Directory | None = None) -> Image.Image:
    """A grey image of 12 or 16 bits, 32-bit integers or floats as 8 bits.

    White is, in this order: what a TIFF gives as the largest sample (tags 340 and 341); all bits set in unsigned
    samples of up to 16 bits, of which the upper 8 are taken; 1 for floats. Raises InputError where none of them holds:
    wider or signed integers, floats outside [0, 1], NaN.
    """
    values = np.asarray(image)
    bits = int((tiff.numbers(BITS) or (16,))[0]) if tiff else 16
    kind = int((tiff.numbers(SAMPLE_FORMAT) or (_UNSIGNED,))[0]) if tiff else _FLOAT if image.mode == "F" else _UNSIGNED
    limits = (tiff.numbers(SAMPLE_MINIMUM), tiff.numbers(SAMPLE_MAXIMUM)) if tiff else ((), ())
    if kind == _UNSIGNED and bits == 32:
        values = values.view(np.uint32)
    if limits[1] and (limits[0] or kind != _SIGNED):
        low, high = (limits[0] or (0.0,))[0], limits[1][0]
    elif kind == _UNSIGNED and bits <= 16:
        grey = (values >> (bits - 8)).astype(np.uint8)
        return Image.fromarray(_black_is_zero(grey, tiff))
    elif kind == _FLOAT:
        low, high = 0.0, 1.0
    else:
        sign = "signed" if kind == _SIGNED else "unsigned"
        raise InputError(
            f"{bits}-bit {sign} greys without a scale (TIFF tags 340 and 341) are not supported: save them with "
            f"16 bits; got {values.min()} to {values.max()}"
        )
    slack = 1e-3 * (high - low)  # resampling overshoots a little
    if not (low < high and values.min() >= low - slack and values.max() <= high + slack):
        raise InputError(f"greys must be in [{low:g}, {high:g}], got {values.min():g} to {values.max():g}")
    scaled = (values.astype(np.float64) - low) * (255 / (high - low))
    return Image.fromarray(_black_is_zero((scaled.clip(0, 255) + 0.5).astype(np.uint8), tiff))


def _black_is_zero(grey: np.ndarray, tiff: Directory | None) -> np.ndarray:
    """Decoders turn WhiteIsZero around for 8 bits and fewer, not for more (``Directory.layout_only``)."""
    return 255 - grey if tiff and tiff.white_is_zero else grey


def _apply_profile(image: Image.Image, profile: bytes) -> Image.Image:
    transform, space = _transform(profile, image.mode)
    if transform is None and image.mode == "L" and space == "RGB":  # grey pixels with a profile for colours
        transform, _ = _transform(profile, "RGB")
        image = image.convert("RGB") if transform else image
    return image if transform is None else _apply(image, transform)


def _apply(image: Image.Image, transform: ImageCms.ImageCmsTransform) -> Image.Image:
    result = ImageCms.applyTransform(image, transform)
    assert result is not None  # it is only where the image is changed in place
    return result


@functools.lru_cache(maxsize=16)
def _transform(profile: bytes, mode: str) -> tuple[ImageCms.ImageCmsTransform | None, str]:
    """From a profile to sRGB for images of ``mode``, and the profile's colour space; None if there is nothing to do."""
    space = ""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = source.profile.xcolor_space.strip()
        if space != _SPACES[mode]:
            return None, space
        # No cache inside: several threads use one transform.
        transform = ImageCms.buildTransform(source, _srgb(), mode, "RGB", flags=ImageCms.Flags.NOCACHE)
        probe = _probe(mode)
        change = np.asarray(_apply(probe, transform)).astype(int) - np.asarray(probe.convert("RGB"))
    except Exception:  # a damaged profile can raise nearly anything
        return None, space
    # sRGB itself comes back with rounding: leave such pixels as they are.
    return (None if mode != "CMYK" and np.abs(change).max() <= 2 else transform), space


def _probe(mode: str) -> Image.Image:
    """Colours that cover the cube, or all greys, to find out what a transform does."""
    if mode == "L":
        return Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    steps = np.linspace(0, 255, 9).round().astype(np.uint8)
    cube = np.stack(np.meshgrid(*[steps] * len(Image.new(mode, (1, 1)).getbands())), axis=-1)
    return Image.fromarray(cube.reshape(1, -1, cube.shape[-1]), mode)


@functools.cache
def _srgb() -> ImageCms.ImageCmsProfile:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))


@functools.cache
def _from_lab() -> ImageCms.ImageCmsTransform:
    lab = ImageCms.createProfile("LAB")
    return ImageCms.buildTransform(lab, _srgb(), "LAB", "RGB", flags=ImageCms.Flags.NOCACHE)
